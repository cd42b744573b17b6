// Answers texts as manifest.json says; the page and examples/run.mjs share this file.
import { Tokenizer } from "./runtime/tokenizers.min.mjs";
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
  const { preprocessing: rule, postprocessing: end } = manifest;
  const config = rule.tokenizer.replace("tokenizer.json", "tokenizer_config.json");
  // Characters that this tokenizer would class by other tables than the one that the model learned with.
  const listed = "stand_ins.json" in manifest.files ? json("stand_ins.json") : [];
  const files = [json(rule.tokenizer), json(config), listed, read(manifest.model), started];
  const [definition, settings, standIns, model, smallest] = await Promise.all(files);
  await smallest.release();
  const tokenizer = new Tokenizer({ ...definition, truncation: null, padding: null }, settings);
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });

  const code = (point) => `\\u{${point.toString(16)}}`;
  const classed = standIns.map(({ ranges, by }) => [
    new RegExp(`[${ranges.map(([first, last]) => `${code(first)}-${code(last)}`).join("")}]`, "gu"),
    by,
  ]);

  /** The ids of a text: special ones before and after as many of its own as there is room for. */
  function encode(text) {
    const { prefix_ids: prefix, suffix_ids: suffix } = rule;
    const clear = classed.reduce((known, [pattern, by]) => known.replace(pattern, by), text);
    const own = tokenizer.encode(clear, { add_special_tokens: false }).ids;
    return [...prefix, ...own.slice(0, rule.max_length - prefix.length - suffix.length), ...suffix];
  }

  /** The model's scores for ids, one a label. */
  async function score(ids) {
    const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const given = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
    const feed = Object.fromEntries(session.inputNames.map((name) => [name, given[name]]));
    return Array.from((await session.run(feed))[end.output].data);
  }

  /** [{label, score}] of a text, likeliest first; scores sum to 1. */
  async function classify(text) {
    const scores = await score(encode(text));
    const highest = Math.max(...scores);
    const powers = scores.map((value) => Math.exp(value - highest));
    const sum = powers.reduce((a, b) => a + b, 0);
    return end.labels.map((label, index) => ({ label, score: powers[index] / sum })).sort((a, b) => b.score - a.score);
  }

  return { manifest, encode, score, classify };
}

/** Runs every case of selftest.json; throws where ids or scores are others, else gives the largest difference. */
export async function selftest(bundle, test) {
  let worst = 0;
  for (const { text, input_ids: expected, logits } of test.cases) {
    const ids = bundle.encode(text);
    if (String(ids) !== String(expected)) throw new Error(`other ids of ${JSON.stringify(text.slice(0, 40))}: ${ids}`);
    const found = await bundle.score(ids);
    const apart = Math.max(...found.map((value, index) => Math.abs(value - logits[index])));
    if (!(apart <= test.tolerance)) throw new Error(`scores ${found}, expected ${logits} within ${test.tolerance}`);
    worst = Math.max(worst, apart);
  }
  return worst;
}
