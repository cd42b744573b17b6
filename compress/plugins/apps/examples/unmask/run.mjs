// What may stand in the place of a mask, offline, in Node: node examples/run.mjs "She opened the [MASK]."  (--selftest)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const words = process.argv.slice(2);
const test = JSON.parse(await read("selftest.json"));
if (words[0] === "--selftest") {
  const worst = await selftest(bundle, test, ({ text }) => text);
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  for (const { label, score } of await bundle.fill(words.join(" ") || test.cases[0].text)) {
    console.log(`${(100 * score).toFixed(2).padStart(6)}%  ${label}`);
  }
}
