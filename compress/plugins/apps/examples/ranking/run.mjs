// Puts texts in order for a query, offline, in Node: node examples/run.mjs "A query?" "One." "Another."  (--selftest)
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
  const own = test.cases.filter(({ text }) => text === test.cases[0].text).map(({ pair }) => pair);
  const [query, ...texts] = words.length > 1 ? words : [test.cases[0].text, ...own];
  for (const { label, score } of await bundle.rank(query, texts)) console.log(`${score.toFixed(3).padStart(6)}  ${label}`);
}
