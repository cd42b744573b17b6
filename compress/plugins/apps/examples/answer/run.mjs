// The words of a text that answer a question, offline, in Node: node examples/run.mjs "A question?" "A text."  (--selftest)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const words = process.argv.slice(2);
const test = JSON.parse(await read("selftest.json"));
if (words[0] === "--selftest") {
  const worst = await selftest(bundle, test, ({ text, pair }) => ({ text, pair }));
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  const [question, context] = words.length > 1 ? words : [test.cases[0].text, test.cases[0].pair];
  console.log((await bundle.find(question, context)).text);
}
