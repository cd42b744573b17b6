// Answers as manifest.json says; the page and examples/run.mjs share this file. What becomes of an input before the model
// sees it is in prepare.mjs, and what becomes of its outputs in finish.mjs.
import { openEnd } from "./finish.mjs";
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
  const end = openEnd(manifest);
  const [way, model, smallest] = await Promise.all([openPreparation(manifest, json), read(manifest.model), started]);
  await smallest.release();
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });

  /** The model's answer to a prepared input: numbers. */
  async function answer(prepared) {
    const given = way.feed(prepared);
    const feed = Object.fromEntries(session.inputNames.map((name) => [name, new ort.Tensor(...given[name])]));
    const found = await session.run(feed, [end.output].flat());
    return end.read(...[end.output].flat().map((name) => found[name].data), prepared);
  }

  const methods = end.methods((input) => answer(way.prepare(input)), way, answer);
  return { manifest, prepare: way.prepare, difference: way.difference, answer, expected: end.expected, tested: end.tested, ...methods };
}

/** Of two vectors. */
export function cosine(one, other) {
  const product = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  return product(one, other) / Math.sqrt(product(one, one) * product(other, other));
}

/**
 * Runs every case of selftest.json, whose input `inputOf` gives. Throws where it is prepared otherwise or answers are
 * others, else gives the largest difference of a number.
 */
export async function selftest(bundle, test, inputOf) {
  let worst = 0;
  for (const known of test.cases) {
    const prepared = bundle.prepare(await inputOf(known));
    const other = bundle.difference(prepared, known);
    if (other) throw new Error(other);
    const [whole, expected] = [await bundle.answer(prepared), bundle.expected(known)];
    const found = bundle.tested ? bundle.tested(whole) : whole;
    const apart = Math.max(...found.map((value, index) => Math.abs(value - expected[index])));
    if ("cosine" in test && !(cosine(found, expected) >= test.cosine)) {
      throw new Error(`the cosine of an answer is ${cosine(found, expected)}, expected ${test.cosine} at least`);
    }
    if (!(apart <= test.tolerance)) {
      throw new Error(`answers ${found.slice(0, 8)}, expected ${expected.slice(0, 8)} within ${test.tolerance}`);
    }
    worst = Math.max(worst, apart);
  }
  return worst;
}
