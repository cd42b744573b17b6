// The chat in a page, from the files of this bundle alone; the page imports it, and so may yours.
import { openChat } from "./chat.mjs";
import * as library from "./runtime/transformers.min.js";

const { env } = library;
const place = (path) => new URL(path, import.meta.url).href;
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false });
env.localModelPath = new URL(".", import.meta.url).pathname;
// What it takes by itself is a build for WebGPU, whose kernels for the processor lack GatherBlockQuantized.
env.backends.onnx.wasm.wasmPaths = {
  mjs: place("runtime/ort-wasm-simd-threaded.mjs"),
  wasm: place("runtime/ort-wasm-simd-threaded.wasm"),
};
env.backends.onnx.wasm.numThreads = 1; // more threads need a server that sends COOP and COEP headers

/** {manifest, json, ids, reply, difference}: see chat.mjs. */
export async function openBundle() {
  const json = async (path) => (await fetch(place(path))).json();
  const manifest = await json("manifest.json");
  return { manifest, json, ...(await openChat(library, manifest, { device: "wasm" })) };
}
