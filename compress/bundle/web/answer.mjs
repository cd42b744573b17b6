// Answers as manifest.json says; the page and examples/run.mjs share this file. What becomes of an input before the model
// sees it is in prepare.mjs.
import { openPreparation } from "./prepare.mjs";
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more threads need a server that sends COOP and COEP headers
export const wasm = ort.env.wasm;
// A graph of one Identity node: opening it starts the runtime while the model is still on its way.
const SMALLEST = "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==";

/** Opens the bundle; `read` gives the bytes of a file by its path. */
export async function openBundle(read) {
  const json = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));
  const started = ort.InferenceSession.create(Uint8Array.from(atob(SMALLEST), (mark) => mark.charCodeAt(0)));
  const manifest = await json("manifest.json");
  const { output, labels } = manifest.postprocessing;
  const [way, model, smallest] = await Promise.all([openPreparation(manifest, json), read(manifest.model), started]);
  await smallest.release();
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });

  /** The model's scores for a prepared input, one a label. */
  async function score(prepared) {
    const given = way.feed(prepared);
    const feed = Object.fromEntries(session.inputNames.map((name) => [name, new ort.Tensor(...given[name])]));
    return Array.from((await session.run(feed))[output].data);
  }

  /** [{label, score}] of an input, likeliest first; scores sum to 1. */
  async function classify(input) {
    const scores = await score(way.prepare(input));
    const highest = Math.max(...scores);
    const powers = scores.map((value) => Math.exp(value - highest));
    const sum = powers.reduce((a, b) => a + b, 0);
    return labels.map((label, index) => ({ label, score: powers[index] / sum })).sort((a, b) => b.score - a.score);
  }

  return { manifest, prepare: way.prepare, difference: way.difference, score, classify };
}

/**
 * Runs every case of selftest.json, whose input `inputOf` gives. Throws where it is prepared otherwise or scores are
 * others, else gives the largest difference of a score.
 */
export async function selftest(bundle, test, inputOf) {
  let worst = 0;
  for (const known of test.cases) {
    const prepared = bundle.prepare(await inputOf(known));
    const other = bundle.difference(prepared, known);
    if (other) throw new Error(other);
    const found = await bundle.score(prepared);
    const apart = Math.max(...found.map((value, index) => Math.abs(value - known.logits[index])));
    if (!(apart <= test.tolerance)) {
      throw new Error(`scores ${found.slice(0, 8)}, expected ${known.logits.slice(0, 8)} within ${test.tolerance}`);
    }
    worst = Math.max(worst, apart);
  }
  return worst;
}
