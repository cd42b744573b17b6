// Pictures in Node, which has no decoder of them.
import { readFile } from "node:fs/promises";
import { readPng } from "./png.mjs";

/** {width, height, data} of a picture; what is no PNG needs sharp (npm install sharp). */
export async function pictureOf(file) {
  const content = await readFile(file);
  if (content.readUInt32BE(0) === 0x89504e47) return readPng(content);
  const sharp = await import("sharp").catch(() => {
    throw new Error(`${file} is no PNG: npm install sharp`);
  });
  const { data, info } = await sharp.default(content).rotate().ensureAlpha().raw().toBuffer({ resolveWithObject: true });
  return { width: info.width, height: info.height, data };
}
