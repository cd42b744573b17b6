// Transcripts by transformers.js, from the files of this bundle alone; the page imports it, and so may yours.
import { env, pipeline } from "./runtime/transformers.min.js";

const place = (path) => new URL(path, import.meta.url).href;
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false });
env.localModelPath = new URL(".", import.meta.url).pathname;
// What it takes by itself is a build for WebGPU; this one for processors has all of their operators.
env.backends.onnx.wasm.wasmPaths = {
  mjs: place("runtime/ort-wasm-simd-threaded.mjs"),
  wasm: place("runtime/ort-wasm-simd-threaded.wasm"),
};
env.backends.onnx.wasm.numThreads = 1; // more threads need a server that sends COOP and COEP headers
const DTYPES = { quantized: "q8", q4: "q4", fp16: "fp16" };

/** {manifest, json, transcribe}. */
export async function openBundle() {
  const json = async (path) => (await fetch(place(path))).json();
  const manifest = await json("manifest.json");
  const dtype = {};
  for (const file of [manifest.model, manifest.postprocessing.decoder]) {
    const name = file.split("/").pop().replace(".onnx", "");
    const kind = name.split("_").pop();
    dtype[kind in DTYPES ? name.slice(0, -kind.length - 1) : name] = DTYPES[kind] ?? "fp32";
  }
  const listen = await pipeline("automatic-speech-recognition", "model", { dtype, device: "wasm" });

  /** What is said in samples between -1 and 1, a Float32Array of one channel at the rate of the manifest. */
  async function transcribe(samples) {
    const seconds = manifest.preprocessing.chunk_seconds;
    const long = samples.length > seconds * manifest.preprocessing.sampling_rate;
    const { text } = await listen(samples, long ? { chunk_length_s: seconds, stride_length_s: seconds / 6 } : {});
    return text.trim();
  }

  return { manifest, json, transcribe };
}

/** The samples of an encoded recording, a blob or file, at the model's rate. */
export async function samplesOf(blob, { sampling_rate: rate }) {
  const context = new OfflineAudioContext(1, 1, rate);
  const heard = await context.decodeAudioData(await blob.arrayBuffer());
  const mixed = new Float32Array(heard.length);
  for (let channel = 0; channel < heard.numberOfChannels; channel++) {
    heard.getChannelData(channel).forEach((value, at) => (mixed[at] += value / heard.numberOfChannels));
  }
  return mixed;
}
