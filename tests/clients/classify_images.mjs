// Classify images with transformers.js, offline: node classify_images.mjs PACKAGE FOLDER MODEL DTYPE SIDE PIXELS, the
// last a file of uint8 [images, side, side, 3].
import { readFileSync } from "node:fs";
const [library, folder, model, dtype, side, pixels] = process.argv.slice(2);
const { env, pipeline, RawImage } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const classify = await pipeline("image-classification", model, { dtype });
const bytes = readFileSync(pixels);
const size = Number(side) * Number(side) * 3;
const answers = [];
for (let at = 0; at < bytes.length; at += size) {
  const image = new RawImage(new Uint8ClampedArray(bytes.subarray(at, at + size)), Number(side), Number(side), 3);
  answers.push((await classify(image, { top_k: 1 }))[0]);
}
console.log(JSON.stringify(answers));
