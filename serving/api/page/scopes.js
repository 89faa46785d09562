// Pictures of a clip: waveform, spectrogram and time axis, drawn column by column in slices.

import { byId } from "./dom.js";
import { Spectrum } from "./fft.js";
import { inSlices } from "./slices.js";
import { color } from "./theme.js";
import { clock } from "./time.js";

const FFT_SIZE = 512;
const FLOOR_DB = -90;
const RANGE_DB = 80;
const LEAST_TICK_PX = 70;
const TICKS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200];
// Dark violet to light yellow: lightness grows with the level, so that it is read without colours, too.
const STOPS = [[12, 7, 38], [74, 18, 107], [165, 44, 96], [235, 104, 59], [250, 193, 90], [252, 253, 191]];

const PALETTE = Array.from({ length: 256 }, (_, level) => {
  const at = (level / 255) * (STOPS.length - 1);
  const [low, high] = [STOPS[Math.floor(at)], STOPS[Math.ceil(at)]];
  return low.map((value, i) => Math.round(value + (high[i] - value) * (at % 1)));
});

function fitted(id) {
  const canvas = byId(id);
  const scale = Math.min(2, window.devicePixelRatio || 1);
  const height = Number(canvas.dataset.height ?? canvas.getAttribute("height"));
  canvas.dataset.height = height;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.round(height * scale);
  return { canvas, context: canvas.getContext("2d"), width: canvas.width, height: canvas.height, scale };
}

async function drawWaveform({ samples }, signal) {
  const { context, width, height } = fitted("waveform");
  context.fillStyle = color("accent");
  const middle = height / 2;
  await inSlices(width, (x) => {
    const [start, end] = [Math.floor((x * samples.length) / width), Math.floor(((x + 1) * samples.length) / width)];
    let [low, high] = [0, 0];
    for (let i = start; i < Math.max(end, start + 1) && i < samples.length; i += 1) {
      if (samples[i] < low) low = samples[i];
      else if (samples[i] > high) high = samples[i];
    }
    const top = middle - Math.min(1, high) * middle;
    context.fillRect(x, top, 1, Math.max(1, (Math.min(1, high) - Math.max(-1, low)) * middle));
  }, signal);
}

async function drawSpectrogram({ samples, rate }, signal) {
  const { context, width, height, scale } = fitted("spectrogram");
  const spectrum = new Spectrum(FFT_SIZE);
  const levels = new Float32Array(spectrum.bins);
  const column = context.createImageData(1, height);
  context.fillStyle = `rgb(${PALETTE[0].join(",")})`;
  context.fillRect(0, 0, width, height);
  await inSlices(width, (x) => {
    spectrum.measure(samples, ((x + 0.5) * samples.length) / width, levels);
    for (let y = 0; y < height; y += 1) {
      const bin = Math.min(spectrum.bins - 1, Math.floor(((height - 1 - y) * spectrum.bins) / height));
      const level = Math.max(0, Math.min(255, Math.round(((levels[bin] - FLOOR_DB) / RANGE_DB) * 255)));
      column.data.set([...PALETTE[level], 255], 4 * y);
    }
    context.putImageData(column, x, 0);
  }, signal);
  // The range of frequencies, on a ground of its own: the picture under it may be of any colour.
  const text = `${rate / 2000} kHz`;
  context.font = `${11 * scale}px system-ui, sans-serif`;
  context.fillStyle = "rgb(0 0 0 / 70%)";
  context.fillRect(0, 0, context.measureText(text).width + 8 * scale, 16 * scale);
  context.fillStyle = "#fff";
  context.textBaseline = "middle";
  context.fillText(text, 4 * scale, 8 * scale);
}

function drawAxis({ duration }) {
  const { context, width, height, scale } = fitted("axis");
  const most = width / (LEAST_TICK_PX * scale);
  const step = TICKS_S.find((seconds) => duration / seconds <= most) ?? TICKS_S.at(-1);
  context.fillStyle = color("quiet");
  context.font = `${11 * scale}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (let time = 0; time < duration; time += step) {
    const x = Math.round((time / duration) * width);
    context.fillRect(x, 0, 1, 4 * scale);
    const text = clock(time, step < 1 ? 1 : 0);
    if (x + context.measureText(text).width < width) context.fillText(text, x + (x ? 3 : 0) * scale, height);
  }
}

let drawing = new AbortController();

// Draw `clip` ({samples, duration}); a later call ends an earlier one.
export async function draw(clip) {
  drawing.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  drawAxis(clip);
  await drawWaveform(clip, signal);
  if (!signal.aborted) await drawSpectrogram(clip, signal);
  if (!signal.aborted) byId("scopes").dataset.drawn = "yes";
}

export function forget() {
  drawing.abort();
  delete byId("scopes").dataset.drawn;
}
