// Transcribe with transformers.js from a local folder, offline: node transcribe.mjs PACKAGE FOLDER MODEL DTYPES SAMPLES
import { readFileSync } from "node:fs";
const [library, folder, model, dtypes, samples] = process.argv.slice(2);
const { env, pipeline } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const transcribe = await pipeline("automatic-speech-recognition", model, { dtype: JSON.parse(dtypes) });
const bytes = readFileSync(samples);
const audio = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
const { text } = await transcribe(audio);
console.log(JSON.stringify(text.trim()));
