// Functions of a page for models that generate tokens; library, WebAssembly and model come from its own server.
import { AutoModelForCausalLM, AutoTokenizer, env, pipeline } from "./transformers.mjs";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("models/", import.meta.url).pathname;
env.useBrowserCache = false;
env.useWasmCache = false;
// The library's default is a WebGPU build, whose CPU kernels lack GatherBlockQuantized.
const place = new URL("ort/ort-wasm-simd-threaded", import.meta.url).href;
env.backends.onnx.wasm.wasmPaths = { mjs: `${place}.mjs`, wasm: `${place}.wasm` };
env.backends.onnx.wasm.numThreads = 1;
const numbers = (tensor) => tensor.tolist()[0].map(Number);

export async function generate(dtype, texts, count) {
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const decoder = await AutoModelForCausalLM.from_pretrained("model", { dtype, device: "wasm" });
  const answers = [];
  for (const text of texts) {
    const inputs = tokenizer(text);
    const whole = await decoder.generate({ ...inputs, do_sample: false, max_new_tokens: count });
    answers.push({ prompt: numbers(inputs.input_ids), whole: numbers(whole) });
  }
  return answers;
}

export async function transcribe(dtype, recordings) {
  const listen = await pipeline("automatic-speech-recognition", "model", { dtype, device: "wasm" });
  const texts = [];
  for (const samples of recordings) {
    const answer = await fetch(new URL(samples, import.meta.url));
    const { text } = await listen(new Float32Array(await answer.arrayBuffer()));
    texts.push(text.trim());
  }
  return texts;
}
