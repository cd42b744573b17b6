// Classifies sentences offline, in Node: node examples/run.mjs "A lovely film." "Dull."  (--selftest: as it was tested)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const sentences = process.argv.slice(2);
if (sentences[0] === "--selftest") {
  const worst = await selftest(bundle, JSON.parse(await read("selftest.json")), ({ text }) => text);
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  for (const sentence of sentences.length > 0 ? sentences : ["A lovely film."]) {
    if (sentences.length > 1) console.log(sentence);
    for (const { label, score } of await bundle.classify(sentence)) {
      console.log(`${(100 * score).toFixed(2).padStart(6)}%  ${label}`);
    }
  }
}
