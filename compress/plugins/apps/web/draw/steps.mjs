// Noise and steps, by `postprocessing` in manifest.json: numbers alone, whoever runs the denoiser.

/** Standard normal numbers, the same of a seed on every platform. */
export function gaussians(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const found = new Float64Array(count + (count % 2));
  for (let at = 0; at < count; at += 2) {
    const radius = Math.sqrt(-2 * Math.log(uniform() + 2 ** -33));
    const angle = 2 * Math.PI * uniform();
    found[at] = radius * Math.cos(angle);
    found[at + 1] = radius * Math.sin(angle);
  }
  return found.subarray(0, count);
}

/** The noise that latents begin as, and that of each step, of a seed. */
export function noiseOf(end, seed) {
  const size = end.channels * end.height * end.width;
  const drawn = gaussians(seed, size * (1 + end.timesteps.length));
  const part = (at) => drawn.subarray(at * size, (at + 1) * size);
  return { noise: Float64Array.from(Float32Array.from(part(0))), added: end.timesteps.map((_, at) => part(at + 1)) };
}

/**
 * The latents that noise ends as. `denoise` gives what the denoiser does of latents at a timestep, `onStep` is told how
 * many steps are done.
 */
export async function draw(end, { noise, added }, denoise, onStep = () => {}) {
  const given = [];
  let latents = noise.map((value) => end.initial * value);
  for (const [place, time] of end.timesteps.entries()) {
    given.push(await denoise(Float32Array.from(latents, (value) => end.scales[place] * value), time));
    latents = noise.map((value) => end.noise[place] * value);
    for (const [earlier, found] of given.entries()) {
      const [share, more] = [end.outputs[place][earlier], end.added[place][earlier]];
      latents = latents.map((value, at) => value + share * found[at] + (more && more * added[earlier][at]));
    }
    await onStep(place + 1);
  }
  return Float32Array.from(latents);
}
