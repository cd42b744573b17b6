// Answers a picture offline, in Node: node examples/run.mjs photo.jpg  (--selftest: as it was tested)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";
import { pictureOf } from "./picture_of_file.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const read = (path) => readFile(local(path));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const [file] = process.argv.slice(2);
if (file === "--selftest") {
  const test = JSON.parse(await read("selftest.json"));
  const worst = await selftest(bundle, test, ({ image }) => pictureOf(local(image)));
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  const answers = await bundle.classify(await pictureOf(file ?? local("samples/1.png")));
  for (const { label, score } of answers.slice(0, 5)) {
    console.log(`${(100 * score).toFixed(2).padStart(6)}%  ${label}`);
  }
}
