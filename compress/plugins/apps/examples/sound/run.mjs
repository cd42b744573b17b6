// Classifies a WAV file of 16 bits offline, in Node: node examples/run.mjs sound.wav  (--selftest: as it was tested)
import { readFile } from "node:fs/promises";
import { openBundle, selftest, wasm } from "../answer.mjs";
import { samplesOf } from "./recording_of_file.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const read = (path) => readFile(local(path));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const { preprocessing } = bundle.manifest;
const [file] = process.argv.slice(2);
if (file === "--selftest") {
  const test = JSON.parse(await read("selftest.json"));
  const worst = await selftest(bundle, test, ({ recording }) => samplesOf(local(recording), preprocessing));
  console.log(`passed; scores differ by at most ${worst.toPrecision(3)}`);
} else {
  const answers = await bundle.classify(await samplesOf(file ?? local("samples/1.wav"), preprocessing));
  for (const { label, score } of answers.slice(0, 5)) {
    console.log(`${(100 * score).toFixed(2).padStart(6)}%  ${label}`);
  }
}
