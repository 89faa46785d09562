// Long work in slices, so that the page answers between them.

const SLICE_MS = 12;

const pause = () => new Promise((resume) => { setTimeout(resume, 0); });

// Call `step(index)` for each index; give the page a turn after each slice. Return false if `signal` has ended it.
export async function inSlices(count, step, signal) {
  let until = performance.now() + SLICE_MS;
  for (let index = 0; index < count; index += 1) {
    step(index);
    if (performance.now() > until) {
      await pause();
      if (signal?.aborted) return false;
      until = performance.now() + SLICE_MS;
    }
  }
  return !signal?.aborted;
}
