// Pictures from prompts, from the files of this bundle alone; the page and examples/run.mjs share this file.
import { openPrompts } from "./prepare.mjs";
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { draw, noiseOf } from "./steps.mjs";

ort.env.wasm.numThreads = 1; // more threads need a server that sends COOP and COEP headers
export const wasm = ort.env.wasm;

/** Opens the bundle; `read` gives the bytes of a file by its path. */
export async function openBundle(read) {
  const json = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));
  const manifest = await json("manifest.json");
  const end = manifest.postprocessing;
  const open = async (path) => ort.InferenceSession.create(await read(path), { executionProviders: ["wasm"] });
  const [prompts, ...sessions] = await Promise.all([
    openPrompts(manifest, json),
    ...[manifest.model, end.denoiser, end.decoder].map(open),
  ]);
  const [encoder, denoiser, decoder] = sessions;
  const guided = end.guidance > 1;

  /** What the text encoder gives for ids. */
  async function encode(row) {
    const given = new ort.Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
    return (await encoder.run({ input_ids: given }, [end.output]))[end.output];
  }
  let nothing; // of the empty prompt, which is the same each time

  /** A picture, {levels, width, height, channels}, levels from 0 to 1; `onStep` is told how many steps are done. */
  async function paint(row, seed, onStep) {
    const texts = [await encode(row)];
    if (guided) texts.push((nothing ??= await encode(end.empty_ids)));
    const count = texts.length;
    const states = new Float32Array(texts.reduce((sum, { data }) => sum + data.length, 0));
    texts.forEach(({ data }, at) => states.set(data, at * data.length));
    const fixed = {
      encoder_hidden_states: new ort.Tensor("float32", states, [count, ...texts[0].dims.slice(1)]),
    };
    if (end.condition.length) {
      const told = Float32Array.from(Array(count).fill(end.condition).flat());
      fixed.timestep_cond = new ort.Tensor("float32", told, [count, end.condition.length]);
    }
    const shape = [end.channels, end.height, end.width];

    async function denoise(latents, time) {
      const sample = new Float32Array(count * latents.length);
      for (let at = 0; at < count; at++) sample.set(latents, at * latents.length);
      const feed = {
        ...fixed,
        sample: new ort.Tensor("float32", sample, [count, ...shape]),
        timestep: new ort.Tensor("float32", [time], []),
      };
      const { out_sample: { data } } = await denoiser.run(feed, ["out_sample"]);
      if (!guided) return data;
      return data.subarray(0, latents.length).map((wanted, at) => {
        const without = data[latents.length + at];
        return without + end.guidance * (wanted - without);
      });
    }

    const latents = await draw(end, noiseOf(end, seed), denoise, onStep);
    const given = latents.map((value) => value / end.scaling + end.shift);
    const found = await decoder.run({ latent_sample: new ort.Tensor("float32", given, [1, ...shape]) }, ["sample"]);
    const [, channels, height, width] = found.sample.dims;
    const levels = new Float32Array(found.sample.data.length);
    for (let channel = 0; channel < channels; channel++) {
      for (let at = 0; at < height * width; at++) {
        const value = found.sample.data[channel * height * width + at];
        levels[at * channels + channel] = Math.min(1, Math.max(0, value / 2 + 0.5));
      }
    }
    return { levels, width, height, channels };
  }

  return { manifest, json, ...prompts, paint, steps: end.timesteps.length };
}

const MOST = 1024;

/** Paints every case of selftest.json; the largest difference of a level. Throws where that is too large. */
export async function selftest(bundle) {
  const test = await bundle.json("selftest.json");
  let worst = 0;
  for (const known of test.cases) {
    const row = bundle.ids(known.text);
    if (String(row) !== String(known.input_ids)) throw new Error(`other ids of ${known.text.slice(0, 40)}: ${row}`);
    const { levels } = await bundle.paint(row, known.seed);
    const every = Math.ceil(levels.length / MOST);
    const found = levels.filter((_, at) => at % every === 0);
    const apart = Math.max(...found.map((value, at) => Math.abs(value - known.picture[at])));
    if (!(found.length === known.picture.length && apart <= test.tolerance)) {
      throw new Error(`levels of ${known.text.slice(0, 40)} differ by ${apart}, ${test.tolerance} is allowed`);
    }
    worst = Math.max(worst, apart);
  }
  return worst;
}
