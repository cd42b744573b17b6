// The nearest of some sentences, offline, in Node: node examples/run.mjs "A question?" "One." "Another."  (--selftest)
import { readFile } from "node:fs/promises";
import { cosine, openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const words = process.argv.slice(2);
const test = JSON.parse(await read("selftest.json"));
if (words[0] === "--selftest") {
  const worst = await selftest(bundle, test, ({ text }) => text);
  console.log(`passed; values differ by at most ${worst.toPrecision(3)}`);
} else {
  const short = test.cases.map(({ text }) => text).filter((text) => text && text.length <= 120);
  const [question, ...sentences] = words.length > 1 ? words : short.slice(0, 7);
  const asked = await bundle.embed(question);
  const found = [];
  for (const sentence of sentences) found.push([cosine(asked, await bundle.embed(sentence)), sentence]);
  for (const [score, sentence] of found.sort((a, b) => b[0] - a[0])) {
    console.log(`${score.toFixed(3).padStart(6)}  ${sentence}`);
  }
}
