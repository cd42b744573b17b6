// transformers.js that reads the files of this bundle alone, for a page of a model that answers token by token.
import { env } from "./runtime/transformers.min.js";

const place = (path) => new URL(path, import.meta.url).href;
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false });
env.localModelPath = new URL(".", import.meta.url).pathname;
// What it takes by itself is a build for WebGPU, which lacks some of the operators of this one for processors.
env.backends.onnx.wasm.wasmPaths = {
  mjs: place("runtime/ort-wasm-simd-threaded.mjs"),
  wasm: place("runtime/ort-wasm-simd-threaded.wasm"),
};
env.backends.onnx.wasm.numThreads = 1; // more threads need a server that sends COOP and COEP headers
const DTYPES = { quantized: "q8", q4: "q4", fp16: "fp16" };

/** What a file of the bundle says. */
export const json = async (path) => (await fetch(place(path))).json();

/** How the weights of an encoder and a decoder are stored: name -> transformers.js' word for it. */
export function typesOf({ model, postprocessing: { decoder } }) {
  const found = {};
  for (const file of [model, decoder]) {
    const name = file.split("/").pop().replace(".onnx", "");
    const kind = name.split("_").pop();
    found[kind in DTYPES ? name.slice(0, -kind.length - 1) : name] = DTYPES[kind] ?? "fp32";
  }
  return found;
}
