// Latents by the bundle's own steps, for a denoiser that is a formula: reads {end, seed} and prints {noise, added, latents}.
import { readFileSync } from "node:fs";
import { draw, noiseOf } from "../../../compress/plugins/apps/web/draw/steps.mjs";

const { end, seed } = JSON.parse(readFileSync(0, "utf8"));
const drawn = noiseOf(end, seed);
let steps = 0;
const denoise = async (latents, time) => {
  const mean = latents.reduce((sum, value) => sum + value, 0) / latents.length;
  return Float32Array.from(latents, (value) => Math.tanh(value + Math.sin(time / 100) + mean));
};
const latents = await draw(end, drawn, denoise, (done) => (steps = done));
const list = (values) => Array.from(values);
console.log(JSON.stringify({ noise: list(drawn.noise), added: drawn.added.map(list), latents: list(latents), steps }));
