// Recordings -> what a classifier of sounds hears, by `preprocessing` in manifest.json. A recording is a Float32Array of
// samples between -1 and 1, of one channel at the rate of the manifest.
const [PLACES, STEP, TOLERANCE] = [64, 10007, 1e-3];
const [HOP_SECONDS, WINDOW_SECONDS, LOWEST_HZ, FLOOR, EMPHASIS] = [0.01, 0.025, 20, 2 ** -23, 0.97];
const mel = (hertz) => 1127 * Math.log(1 + hertz / 700);

/** {prepare, feed, difference}. */
export async function openPreparation({ preprocessing: rule }) {
  const { spectrogram: drawn, sampling_rate: rate } = rule;
  const draw = drawn && spectrograms(drawn, rate);

  /** {data, shape}: a spectrogram [1, frames, mel_bins], or samples [1, length]. */
  function prepare(samples) {
    if (drawn) return { data: draw(samples), shape: [1, drawn.frames, drawn.mel_bins] };
    const data = Float32Array.from(samples);
    if (rule.normalize) {
      const mean = data.reduce((sum, value) => sum + value, 0) / data.length;
      const variance = data.reduce((sum, value) => sum + (value - mean) ** 2, 0) / data.length;
      data.forEach((value, at) => (data[at] = (value - mean) / Math.sqrt(variance + 1e-7)));
    }
    return { data, shape: [1, data.length] };
  }

  /** The model's inputs: name -> type, values, shape. */
  function feed({ data, shape }) {
    const mask = rule.mask ? { [rule.mask]: ["int64", new BigInt64Array(data.length).fill(1n), shape] } : {};
    return { [rule.input]: ["float32", data, shape], ...mask };
  }

  /** What is other than in a case of the self-test; nothing if it is the same. */
  function difference({ data }, { recording, features }) {
    const found = features.map((_, place) => data[(place * STEP) % data.length]);
    const wrong = found.findIndex((value, place) => !(Math.abs(value - features[place]) <= TOLERANCE));
    return wrong < 0 ? "" : `feature ${wrong} of ${recording} is ${found[wrong]}, expected ${features[wrong]}`;
  }

  return { prepare, feed, difference };
}

/** A function: samples -> log-mel features as Kaldi has them. */
function spectrograms({ mel_bins: bins, frames, mean, std }, rate) {
  const [size, hop] = [Math.round(WINDOW_SECONDS * rate), Math.round(HOP_SECONDS * rate)];
  const width = 2 ** Math.ceil(Math.log2(size));
  const window = Float64Array.from({ length: size }, (_, at) => 0.5 - 0.5 * Math.cos((2 * Math.PI * at) / (size - 1)));
  const [lowest, highest] = [mel(LOWEST_HZ), mel(rate / 2)];
  const edge = (bin) => lowest + (bin * (highest - lowest)) / (bins + 1);
  const places = Float64Array.from({ length: width / 2 + 1 }, (_, at) => mel((at * rate) / width));
  const filters = Array.from({ length: bins }, (_, bin) => {
    const [low, middle, high] = [edge(bin), edge(bin + 1), edge(bin + 2)];
    return places.map((at) => Math.max(0, Math.min((at - low) / (middle - low), (high - at) / (high - middle))));
  });

  return (samples) => {
    const found = new Float32Array(frames * bins).fill(-mean / (2 * std));
    for (let frame = 0; frame < frames && frame * hop + size <= samples.length; frame++) {
      const piece = Float64Array.from(samples.subarray(frame * hop, frame * hop + size));
      const middle = piece.reduce((sum, value) => sum + value, 0) / size;
      const real = new Float64Array(width);
      piece.forEach((value, at) => {
        real[at] = (value - middle - EMPHASIS * (piece[Math.max(at - 1, 0)] - middle)) * window[at];
      });
      const power = powers(real);
      filters.forEach((filter, bin) => {
        const sum = filter.reduce((total, weight, at) => total + weight * power[at], 0);
        found[frame * bins + bin] = (Math.log(Math.max(sum, FLOOR)) - mean) / (2 * std);
      });
    }
    return found;
  };
}

/** The squares of the Fourier transform of 2^n numbers, up to half the rate (Cooley and Tukey 1965). */
function powers(real) {
  const size = real.length;
  const imaginary = new Float64Array(size);
  for (let at = 1, mirrored = 0; at < size; at++) {
    let bit = size >> 1;
    for (; mirrored & bit; bit >>= 1) mirrored ^= bit;
    mirrored ^= bit;
    if (at < mirrored) [real[at], real[mirrored]] = [real[mirrored], real[at]];
  }
  for (let span = 2; span <= size; span *= 2) {
    for (let start = 0; start < size; start += span) {
      for (let at = 0; at < span / 2; at++) {
        const [cos, sin] = [Math.cos((2 * Math.PI * at) / span), -Math.sin((2 * Math.PI * at) / span)];
        const [one, other] = [start + at, start + at + span / 2];
        const [x, y] = [real[other] * cos - imaginary[other] * sin, real[other] * sin + imaginary[other] * cos];
        [real[other], imaginary[other]] = [real[one] - x, imaginary[one] - y];
        [real[one], imaginary[one]] = [real[one] + x, imaginary[one] + y];
      }
    }
  }
  return Float64Array.from({ length: size / 2 + 1 }, (_, at) => real[at] ** 2 + imaginary[at] ** 2);
}
