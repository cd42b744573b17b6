// Writes a text from another offline, in Node: node examples/run.mjs "A text."  (--selftest: as it was tested)
// Needs: npm install @huggingface/transformers@4.3.1, which brings ONNX Runtime for this machine.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import * as library from "@huggingface/transformers";
import { openWriter } from "../rewrite.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const json = async (path) => JSON.parse(await readFile(local(path), "utf8"));
library.env.allowRemoteModels = false;
library.env.localModelPath = fileURLToPath(local("."));
const manifest = await json("manifest.json");
const types = { quantized: "q8", q4: "q4", fp16: "fp16" };
const dtype = Object.fromEntries(
  [manifest.model, manifest.postprocessing.decoder].map((file) => {
    const [, name, , kind] = file.match(/([^/]+?)(_(quantized|q4|fp16))?\.onnx$/);
    return [name, types[kind] ?? "fp32"];
  }),
);
const writer = await openWriter(library, manifest, { dtype });

const text = process.argv.slice(2).join(" ");
const { cases } = await json("selftest.json");
if (text === "--selftest") {
  for (const known of cases) {
    if (String(writer.ids(known.text)) !== String(known.input_ids)) throw new Error(`other ids of ${known.text}`);
    const written = await writer.rewrite(known.text);
    console.log(`${written === known.written ? "the same" : `expected ${known.written}, written`}: ${written}`);
  }
} else {
  console.log(await writer.rewrite(text || cases[0].text));
}
