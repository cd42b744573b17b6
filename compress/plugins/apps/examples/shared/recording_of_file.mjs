// Recordings in Node.
import { readFile } from "node:fs/promises";

/** The samples of a WAV file as `samples/` has them: one channel of 16 bits at the model's rate. */
export async function samplesOf(path, { sampling_rate: rate }) {
  const bytes = await readFile(path);
  if (bytes.readUInt32LE(24) !== rate || bytes.readUInt16LE(22) !== 1 || bytes.readUInt16LE(34) !== 16) {
    throw new Error(`${path}: take ${rate} Hz, one channel and 16 bits`);
  }
  const start = bytes.indexOf("data") + 8;
  return Float32Array.from({ length: (bytes.length - start) >> 1 }, (_, at) => bytes.readInt16LE(start + 2 * at) / 32768);
}
