// Marks the words of a sentence offline, in Node: node examples/run.mjs "Ada Lovelace in London."  (--selftest: as tested)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const words = process.argv.slice(2);
if (words[0] === "--selftest") {
  const worst = await selftest(bundle, JSON.parse(await read("selftest.json")), ({ text }) => text);
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  for (const { kind, text } of await bundle.entities(words.join(" ") || "Ada Lovelace in London.")) {
    if (kind) console.log(`${kind.padEnd(12)}  ${text}`);
  }
}
