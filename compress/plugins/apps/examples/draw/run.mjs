// Draws a prompt offline, in Node: node examples/run.mjs "a coat" 7 > coat.png, 7 being a seed  (--selftest: as it was tested)
import { readFile } from "node:fs/promises";
import { crc32, deflateSync } from "node:zlib";
import { openBundle, selftest, wasm } from "../answer.mjs";

const read = (path) => readFile(new URL(`../${path}`, import.meta.url));
wasm.wasmBinary = await read("runtime/ort-wasm-simd-threaded.wasm");
const bundle = await openBundle(read);
const [prompt, seed] = process.argv.slice(2);

/** A PNG of levels from 0 to 1: gray, or RGB. */
function png({ levels, width, height, channels }) {
  const part = (kind, body) => {
    const named = Buffer.concat([Buffer.from(kind, "latin1"), body]);
    const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(body.length);
    sum.writeUInt32BE(crc32(named));
    return Buffer.concat([length, named, sum]);
  };
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width);
  header.writeUInt32BE(height, 4);
  header.set([8, channels === 1 ? 0 : 2], 8);
  const stride = width * channels;
  const rows = Buffer.alloc(height * (stride + 1));
  levels.forEach((level, at) => (rows[at + Math.floor(at / stride) + 1] = Math.round(255 * level)));
  const magic = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);
  return Buffer.concat([magic, part("IHDR", header), part("IDAT", deflateSync(rows)), part("IEND", Buffer.alloc(0))]);
}

if (prompt === "--selftest") {
  console.log(`passed; levels differ by at most ${(await selftest(bundle)).toPrecision(3)}`);
} else {
  const onStep = (done) => console.error(`step ${done} of ${bundle.steps}`);
  process.stdout.write(png(await bundle.paint(bundle.ids(prompt ?? "a coat"), Number(seed ?? 0), onStep)));
}
