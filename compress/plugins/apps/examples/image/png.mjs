// PNG -> {width, height, data}, RGBA in bytes, by Node alone: 8 bits, not interlaced, gray or RGB, perhaps with alpha.
import { inflateSync } from "node:zlib";

const DEPTHS = { 0: 1, 2: 3, 4: 2, 6: 4 };

export function readPng(content) {
  const parts = [];
  let header;
  for (let at = 8; at < content.length; ) {
    const [length, kind] = [content.readUInt32BE(at), content.toString("latin1", at + 4, at + 8)];
    const body = content.subarray(at + 8, at + 8 + length);
    if (kind === "IHDR") header = body;
    if (kind === "IDAT") parts.push(body);
    if (kind === "tRNS") throw new Error("a PNG with one transparent colour: npm install sharp, or save it again");
    at += length + 12;
  }
  const [width, height, bits, type, , , interlaced] = [header.readUInt32BE(0), header.readUInt32BE(4), ...header.subarray(8)];
  const depth = DEPTHS[type];
  if (bits !== 8 || !depth || interlaced) throw new Error("a PNG of another kind: npm install sharp, or save it again");
  const rows = unfiltered(inflateSync(Buffer.concat(parts)), width * depth, height, depth);
  const data = new Uint8Array(width * height * 4);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const own = rows.subarray(pixel * depth, (pixel + 1) * depth);
    const colour = depth < 3 ? [own[0], own[0], own[0]] : own.subarray(0, 3);
    data.set(colour, pixel * 4);
    data[pixel * 4 + 3] = depth % 2 ? 255 : own[depth - 1];
  }
  return { width, height, data };
}

/** Takes back what each row says of its difference from its neighbours: PNG specification, section 9. */
function unfiltered(packed, stride, height, depth) {
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const filter = packed[y * (stride + 1)];
    for (let x = 0; x < stride; x++) {
      const at = y * stride + x;
      const left = x < depth ? 0 : rows[at - depth];
      const above = y ? rows[at - stride] : 0;
      const corner = y && x >= depth ? rows[at - stride - depth] : 0;
      const guess = [0, left, above, (left + above) >> 1, nearest(left, above, corner)][filter];
      rows[at] = packed[y * (stride + 1) + 1 + x] + guess;
    }
  }
  return rows;
}

function nearest(left, above, corner) {
  const [a, b, c] = [above - corner, left - corner, left + above - 2 * corner].map(Math.abs);
  if (a <= b && a <= c) return left;
  return b <= c ? above : corner;
}
