// The ids of lines by a bundle's own code: node ids.mjs FOLDER LINES.json
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
const [folder, lines] = process.argv.slice(2);
const { openBundle, wasm } = await import(pathToFileURL(`${folder}/answer.mjs`));
const read = (path) => readFile(`${folder}/${path}`);
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
process.stdout.write(JSON.stringify(JSON.parse(await readFile(lines)).map(bundle.prepare)));
