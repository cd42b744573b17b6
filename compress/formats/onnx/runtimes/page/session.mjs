// One model in onnxruntime-web, which answers batches and times its own calls; a page and Node share this file.
// Batches and answers pass as safetensors: the length of a JSON header, the header, the bytes.
const TYPES = {
  F32: ["float32", Float32Array],
  F64: ["float64", Float64Array],
  F16: ["float16", globalThis.Float16Array ?? Uint16Array],
  I64: ["int64", BigInt64Array],
  U64: ["uint64", BigUint64Array],
  I32: ["int32", Int32Array],
  U32: ["uint32", Uint32Array],
  I16: ["int16", Int16Array],
  U16: ["uint16", Uint16Array],
  I8: ["int8", Int8Array],
  U8: ["uint8", Uint8Array],
  BOOL: ["bool", Uint8Array],
};
const NAMES = Object.fromEntries(Object.entries(TYPES).map(([name, [type]]) => [type, name]));
// A graph of one Identity node: opening it starts the runtime, before any model is there.
const SMALLEST = "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==";

let ort, base, provider, session;
let batches = [];

const now = () => performance.now();

async function read(path) {
  const answer = await fetch(base + path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

/** Milliseconds of `work`, and what it gave. */
async function taking(work) {
  const began = now();
  const found = await work();
  return [now() - began, found];
}

function unpacked(bytes) {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [type, Kind] = TYPES[dtype];
    tensors[name] = new ort.Tensor(type, new Kind(bytes.slice(8 + length + begin, 8 + length + end).buffer), shape);
  }
  return tensors;
}

function packed(tensors) {
  const header = {};
  const parts = [];
  let end = 0;
  for (const [name, { type, dims, data }] of Object.entries(tensors)) {
    const begin = end;
    end += data.byteLength;
    header[name] = { dtype: NAMES[type], shape: dims, data_offsets: [begin, end] };
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  let words = new TextEncoder().encode(JSON.stringify(header));
  const pad = new Uint8Array((8 - (words.length % 8)) % 8).fill(32);
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(words.length + pad.length), true);
  return new Blob([length, words, pad, ...parts]);
}

/** Starts the runtime: its bytes first, then what compiling them takes, so that the two are told apart. */
export async function start({ address, script, wasm, threads, device }) {
  base = address;
  provider = device;
  const [script_ms, module] = await taking(() => import(script));
  ort = module;
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  const [download_ms, binary] = await taking(() => read(wasm));
  ort.env.wasm.wasmBinary = binary;
  const smallest = Uint8Array.from(atob(SMALLEST), (mark) => mark.charCodeAt(0));
  const [compile_ms, probe] = await taking(() => ort.InferenceSession.create(smallest, options()));
  await probe.release();
  return {
    runtime_download_ms: script_ms + download_ms,
    runtime_compile_ms: compile_ms,
    version: ort.env.versions.web ?? ort.env.versions.common,
    isolated: globalThis.crossOriginIsolated ?? null,
  };
}

const options = () => ({ executionProviders: [provider], graphOptimizationLevel: "all", executionMode: "sequential" });

/** Opens the model; `others` are the files that its graph keeps weights in. */
export async function open({ model, others }) {
  const [model_download_ms, [graph, ...data]] = await taking(() => Promise.all([model, ...others].map(read)));
  const externalData = others.map((path, place) => ({ path: path.split("/").slice(1).join("/"), data: data[place] }));
  const more = externalData.length ? { externalData } : {};
  const [session_create_ms, made] = await taking(() => ort.InferenceSession.create(graph, { ...options(), ...more }));
  session = made;
  const types = (entries) => entries.map(({ name, type, shape }) => ({ name, dtype: type, shape }));
  return {
    model_download_ms,
    session_create_ms,
    inputs: types(session.inputMetadata),
    outputs: types(session.outputMetadata),
  };
}

/** Takes the batches that calls are numbered by. */
export async function hold({ path }) {
  batches = [];
  for (const [name, tensor] of Object.entries(unpacked(await read(path)))) {
    const cut = name.indexOf("/");
    (batches[Number(name.slice(0, cut))] ??= {})[name.slice(cut + 1)] = tensor;
  }
  return batches.length;
}

/** Answers one batch; the answer is sent to where the batch came from. */
export async function predict({ path }) {
  const outputs = await session.run(unpacked(await read(path)));
  await fetch(base + path, { method: "POST", body: await packed(outputs).arrayBuffer() });
}

/** Milliseconds of one call for each number in `calls`. */
export async function time({ calls }) {
  const latencies = [];
  for (const index of calls) {
    const batch = batches[index];
    const began = now();
    await session.run(batch);
    latencies.push(now() - began);
  }
  return latencies;
}

/** Milliseconds from each arrival to its answer; requests wait for those before them. */
export async function queued_latencies({ calls, gaps }) {
  const latencies = [];
  let due = now();
  for (const [place, index] of calls.entries()) {
    due += gaps[place];
    // Timers come up to some milliseconds late; the rest is waited for awake.
    if (due - now() > 10) await new Promise((done) => setTimeout(done, due - now() - 8));
    while (now() < due);
    await session.run(batches[index]);
    latencies.push(now() - due);
  }
  return latencies;
}

/** Bytes that came over the wire for each path, by the Performance API (headers included). */
export async function transfers() {
  const entries = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
  return entries.map(({ name, transferSize }) => [name, transferSize]);
}
