// Answers of transformers.js in a page, each text by itself; models and WebAssembly come from the page's own server.
export async function answers(address, task, model, texts, options, plain) {
  const { env, pipeline } = await import("./transformers/transformers.min.js");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false });
  env.localModelPath = new URL("models/", address).pathname;
  // The build that it takes by itself is for WebGPU; the plain one for processors has more of their operators.
  const build = `${address}transformers/ort-wasm-simd-threaded`;
  env.backends.onnx.wasm.wasmPaths = plain ? { mjs: `${build}.mjs`, wasm: `${build}.wasm` } : `${address}transformers/`;
  env.backends.onnx.wasm.numThreads = 1;
  const answer = await pipeline(task, model, { dtype: "q8", device: "wasm" });
  const found = [];
  for (const text of texts) {
    const one = await answer(text, options);
    found.push(one.tolist ? one.tolist()[0] : one[0]);
  }
  return found;
}
