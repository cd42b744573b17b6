// The nearest of some pictures, offline, in Node: node examples/run.mjs photo.jpg one.jpg another.jpg  (--selftest)
import { readFile } from "node:fs/promises";
import { cosine, openBundle, selftest, wasm } from "../answer.mjs";
import { pictureOf } from "./picture_of_file.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const read = (path) => readFile(local(path));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const [file, ...others] = process.argv.slice(2);
if (file === "--selftest") {
  const test = JSON.parse(await read("selftest.json"));
  const worst = await selftest(bundle, test, ({ image }) => pictureOf(local(image)));
  console.log(`passed; values differ by at most ${worst.toPrecision(3)}`);
} else {
  const { cases } = JSON.parse(await read("selftest.json"));
  const asked = await bundle.embed(await pictureOf(file ?? local("samples/1.png")));
  const found = [];
  for (const other of others.length ? others : cases.map(({ image }) => local(image))) {
    found.push([cosine(asked, await bundle.embed(await pictureOf(other))), String(other).split("/").pop()]);
  }
  for (const [score, name] of found.sort((a, b) => b[0] - a[0])) console.log(`${score.toFixed(3).padStart(6)}  ${name}`);
}
