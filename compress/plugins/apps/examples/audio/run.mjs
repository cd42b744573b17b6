// Transcribes a WAV file of 16 bits offline, in Node: node examples/run.mjs speech.wav  (--selftest: as it was tested)
// Needs: npm install @huggingface/transformers@4.3.1, which brings ONNX Runtime for this machine.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { env, pipeline } from "@huggingface/transformers";
import { samplesOf } from "./recording_of_file.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const json = async (path) => JSON.parse(await readFile(local(path), "utf8"));
const { model, preprocessing, postprocessing } = await json("manifest.json");
env.allowRemoteModels = false;
env.localModelPath = fileURLToPath(local("."));
const types = { quantized: "q8", q4: "q4", fp16: "fp16" };
const dtype = Object.fromEntries(
  [model, postprocessing.decoder].map((file) => {
    const [, name, , kind] = file.match(/([^/]+?)(_(quantized|q4|fp16))?\.onnx$/);
    return [name, types[kind] ?? "fp32"];
  }),
);
const listen = await pipeline("automatic-speech-recognition", "model", { dtype });

const [file] = process.argv.slice(2);
if (file === "--selftest") {
  for (const { recording, transcript } of (await json("selftest.json")).cases) {
    const { text } = await listen(await samplesOf(local(recording), preprocessing));
    console.log(`${text.trim() === transcript ? "the same" : `expected ${transcript}, heard`}: ${text.trim()}`);
  }
} else {
  const { text } = await listen(await samplesOf(file ?? local("samples/1.wav"), preprocessing), { chunk_length_s: preprocessing.chunk_seconds });
  console.log(text.trim());
}
