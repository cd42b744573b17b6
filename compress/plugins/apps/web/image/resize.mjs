// Resizing as Pillow does it, bit for bit: a filter as wide as it takes to see every pixel, in whole numbers, first along
// rows, then along columns. A canvas resizes otherwise in every browser, and a model would be shown other pictures.
const PRECISION = 22;
const HALF = 1 << (PRECISION - 1);
const sinc = (x) => (x ? Math.sin(x * Math.PI) / (x * Math.PI) : 1);
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => cubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** Keys' cubic with a = -1/2. */
function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** Width and height that `rule`, the manifest's `resize`, makes of an image. */
export function resizedSize({ width, height }, rule) {
  if (!rule.shortest_edge) return [rule.width, rule.height];
  const other = Math.trunc((rule.shortest_edge * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [rule.shortest_edge, other] : [other, rule.shortest_edge];
}

/** An image {width, height, data}, `depth` bytes a pixel, in another size. */
export function resize(image, depth, width, height, filter) {
  let { data } = image;
  if (width !== image.width) data = alongRows(data, image.width, image.height, depth, width, filter);
  if (height !== image.height) data = alongColumns(data, image.height, width * depth, height, filter);
  return { width, height, data };
}

function alongRows(data, before, rows, depth, after, filter) {
  const { first, count, weights, most } = kernel(before, after, filter);
  const found = new Uint8ClampedArray(rows * after * depth);
  for (let row = 0, to = 0; row < rows; row++) {
    for (let x = 0; x < after; x++) {
      const start = (row * before + first[x]) * depth;
      for (let channel = 0; channel < depth; channel++, to++) {
        let sum = HALF;
        for (let k = 0, from = start + channel; k < count[x]; k++, from += depth) {
          sum = (sum + Math.imul(data[from], weights[x * most + k])) | 0;
        }
        found[to] = sum >> PRECISION;
      }
    }
  }
  return found;
}

function alongColumns(data, before, stride, after, filter) {
  const { first, count, weights, most } = kernel(before, after, filter);
  const found = new Uint8ClampedArray(after * stride);
  for (let y = 0, to = 0; y < after; y++) {
    for (let x = 0; x < stride; x++, to++) {
      let sum = HALF;
      for (let k = 0, from = first[y] * stride + x; k < count[y]; k++, from += stride) {
        sum = (sum + Math.imul(data[from], weights[y * most + k])) | 0;
      }
      found[to] = sum >> PRECISION;
    }
  }
  return found;
}

/** For each place after, the first and the number of places before, and their weights in units of 2^-22. */
function kernel(before, after, filter) {
  const [reach, weigh] = FILTERS[filter];
  const scale = before / after;
  const wide = Math.max(scale, 1);
  const support = reach * wide;
  const most = Math.ceil(support) * 2 + 1;
  const [first, count, weights] = [new Int32Array(after), new Int32Array(after), new Int32Array(after * most)];
  for (let place = 0; place < after; place++) {
    const center = (place + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const high = Math.min(before, Math.trunc(center + support + 0.5));
    const own = Array.from({ length: high - low }, (_, k) => weigh((k + low - center + 0.5) * (1 / wide)));
    const sum = own.reduce((a, b) => a + b, 0);
    [first[place], count[place]] = [low, high - low];
    own.forEach((weight, k) => {
      const units = (sum ? weight / sum : weight) * (1 << PRECISION);
      weights[place * most + k] = Math.trunc(units < 0 ? units - 0.5 : units + 0.5);
    });
  }
  return { first, count, weights, most };
}
