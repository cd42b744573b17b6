// Scores of token ids by onnxruntime-web alone, as an app calls it, in a page or in Node:
// node alone.mjs LIBRARY WASM MODEL ROWS, the last a list of {input name: ids} as JSON.
export async function scores(library, wasm, model, rows) {
  const ort = await import(library);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm;
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  const found = [];
  for (const row of rows) {
    const tensor = (ids) => new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    const feed = Object.fromEntries(session.inputNames.map((name) => [name, tensor(row[name])]));
    found.push(Array.from((await session.run(feed))[session.outputNames[0]].data));
  }
  return found;
}

if (globalThis.process?.argv?.[1]) {
  const { readFileSync } = await import("node:fs");
  const [library, wasm, model, rows] = process.argv.slice(2);
  console.log(JSON.stringify(await scores(library, readFileSync(wasm), readFileSync(model), JSON.parse(rows))));
}
