// Times of a clip as people write them.

// Return seconds as `m:ss` or `h:mm:ss`, with some digits of a second.
export function clock(seconds, digits = 0) {
  const units = 10 ** digits;
  const all = Math.round(seconds * units);
  const whole = Math.floor(all / units);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const fraction = digits ? `.${String(all % units).padStart(digits, "0")}` : "";
  const tail = `${String(rest).padStart(2, "0")}${fraction}`;
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}
