// The clip: its bytes, its samples for the pictures, and its base64 for the request.

import { t } from "./i18n.js";

// 10 MiB of base64 text are accepted; a quarter is lost to base64, some is left for the rest of the request.
export const MAX_BYTES = 7.5 * 1024 * 1024;

const RATE_HZ = 16_000; // what the model hears
const LONG_S = 600;
const LONG_RATE_HZ = 8000; // half the memory: a decoder makes all samples of all channels before one can be read
const BASE64_STEP = 3 * 64 * 1024;

export class ClipError extends Error {}

export class Clip {
  constructor(blob, name) {
    Object.assign(this, { blob, name, samples: null, duration: null, rate: 0 });
    this.address = URL.createObjectURL(blob);
  }

  static of(blob, name) {
    if (!blob.size) throw new ClipError(t("emptyFile"));
    if (blob.size > MAX_BYTES) throw new ClipError(t("tooLarge", { size: (blob.size / 1e6).toFixed(1) }));
    return new Clip(blob, name);
  }

  release() {
    URL.revokeObjectURL(this.address);
  }

  // Decode the clip to one channel. A browser that cannot decode it leaves `samples` empty.
  async decode(player) {
    const known = await metadataDuration(player, this.address);
    const rate = known > LONG_S ? LONG_RATE_HZ : RATE_HZ;
    try {
      const bytes = await this.blob.arrayBuffer();
      const decoded = await contextOf(rate).decodeAudioData(bytes);
      this.rate = decoded.sampleRate;
      this.duration = decoded.duration;
      this.samples = mono(decoded);
    } catch {
      this.samples = null;
      this.duration = known || null;
    }
  }

  async base64() {
    const bytes = new Uint8Array(await this.blob.arrayBuffer());
    const parts = [];
    for (let start = 0; start < bytes.length; start += BASE64_STEP) {
      let text = "";
      for (const byte of bytes.subarray(start, start + BASE64_STEP)) text += String.fromCharCode(byte);
      parts.push(btoa(text));
    }
    return parts.join("");
  }
}

function contextOf(rate) {
  try {
    return new OfflineAudioContext(1, 1, rate);
  } catch {
    return new OfflineAudioContext(1, 1, 44_100); // a browser that knows only common rates
  }
}

function mono(decoded) {
  if (decoded.numberOfChannels === 1) return decoded.getChannelData(0);
  const [left, right] = [decoded.getChannelData(0), decoded.getChannelData(1)];
  const mixed = new Float32Array(left.length);
  for (let i = 0; i < mixed.length; i += 1) mixed[i] = (left[i] + right[i]) / 2;
  return mixed;
}

// The duration that the file's own metadata state, 0 if unknown: a recording has none.
function metadataDuration(player, address) {
  return new Promise((resolve) => {
    const done = () => resolve(Number.isFinite(player.duration) ? player.duration : 0);
    player.addEventListener("loadedmetadata", done, { once: true });
    player.addEventListener("error", () => resolve(0), { once: true });
    setTimeout(done, 3000);
    player.src = address;
  });
}
