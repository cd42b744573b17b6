// The class of each pixel of a picture, offline, in Node: node examples/run.mjs photo.jpg  (--selftest: as it was tested)
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
  const ids = await bundle.segment(await pictureOf(file ?? local("samples/1.png")));
  const counts = bundle.manifest.postprocessing.labels.map((label) => ({ label, count: 0 }));
  for (const id of ids) counts[id].count++;
  for (const { label, count } of counts.sort((a, b) => b.count - a.count).slice(0, 5)) {
    console.log(`${((100 * count) / ids.length).toFixed(2).padStart(6)}%  ${label}`);
  }
}
