// Magnitudes of a windowed real signal by a radix-2 FFT.

export class Spectrum {
  constructor(size) {
    this.size = size;
    this.bins = size / 2;
    this.real = new Float32Array(size);
    this.imaginary = new Float32Array(size);
    this.window = Float32Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / (size - 1)));
    this.cosine = Float32Array.from({ length: size / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.sine = Float32Array.from({ length: size / 2 }, (_, i) => Math.sin((2 * Math.PI * i) / size));
    const bits = Math.log2(size);
    this.order = Uint16Array.from({ length: size }, (_, i) => {
      let reversed = 0;
      for (let bit = 0; bit < bits; bit += 1) reversed |= ((i >> bit) & 1) << (bits - 1 - bit);
      return reversed;
    });
  }

  // Write the level of each bin in decibels below full scale into `levels`, from the samples around `centre`.
  measure(samples, centre, levels) {
    const { size, real, imaginary } = this;
    const start = Math.round(centre - size / 2);
    for (let i = 0; i < size; i += 1) {
      const from = this.order[i];
      real[i] = (samples[start + from] ?? 0) * this.window[from];
      imaginary[i] = 0;
    }
    for (let length = 2; length <= size; length *= 2) {
      const half = length / 2;
      const step = size / length;
      for (let block = 0; block < size; block += length) {
        for (let i = 0; i < half; i += 1) {
          const [a, b] = [block + i, block + i + half];
          const [cosine, sine] = [this.cosine[i * step], this.sine[i * step]];
          const re = real[b] * cosine + imaginary[b] * sine;
          const im = imaginary[b] * cosine - real[b] * sine;
          real[b] = real[a] - re;
          imaginary[b] = imaginary[a] - im;
          real[a] += re;
          imaginary[a] += im;
        }
      }
    }
    for (let bin = 0; bin < this.bins; bin += 1) {
      levels[bin] = 20 * Math.log10((4 * Math.hypot(real[bin], imaginary[bin])) / size + 1e-6);
    }
  }
}
