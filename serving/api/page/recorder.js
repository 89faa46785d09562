// Recording from the microphone, with a level, until the person or the greatest length ends it.

import { byId, show } from "./dom.js";
import { onLanguage, t, when } from "./i18n.js";
import { clock } from "./time.js";

const MAX_S = 600;
const BITS_PER_S = 64_000;
const TYPES = ["audio/webm;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];

export class RecorderError extends Error {}

let recorder = null;

const labels = () => { byId("record").textContent = t(recorder ? "stopRecording" : "record"); };

export const recording = () => recorder !== null;
export const stopRecording = () => recorder?.stop();

// Start; `onClip(blob, name)` is called at the end. Raises `RecorderError`.
export async function startRecording(onClip) {
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) throw new RecorderError(t("noRecorder"));
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    throw new RecorderError(t("noMicrophone", { reason: error.message || error.name }));
  }
  const release = () => { for (const track of stream.getTracks()) track.stop(); };
  const mimeType = TYPES.find((type) => MediaRecorder.isTypeSupported(type));
  const parts = [];
  try {
    recorder = new MediaRecorder(stream, { mimeType, audioBitsPerSecond: BITS_PER_S });
  } catch {
    release();
    throw new RecorderError(t("noRecorder"));
  }
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const meter = startMeter(stream);
  recorder.addEventListener("stop", () => {
    const type = recorder.mimeType;
    recorder = null;
    meter.stop();
    release();
    show("recording", false);
    labels();
    onClip(new Blob(parts, { type }), t("recordingName", { time: when(new Date()) }));
  });
  recorder.start(1000);
  show("recording");
  labels();
}

function startMeter(stream) {
  const context = new AudioContext();
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const started = performance.now();
  const timer = setInterval(() => {
    const seconds = (performance.now() - started) / 1000;
    analyser.getFloatTimeDomainData(samples);
    const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    byId("level").style.width = `${Math.round(100 * Math.min(1, peak))}%`;
    byId("recording-time").textContent = t("recordingFor", { time: clock(seconds) });
    if (seconds >= MAX_S) {
      byId("clip-error").textContent = t("recordingEnded");
      stopRecording();
    }
  }, 100);
  return {
    stop() {
      clearInterval(timer);
      context.close();
    },
  };
}

export const startRecorder = () => onLanguage(labels);
