// Pictures -> floats, by `preprocessing` in manifest.json. A picture is {width, height, data}: RGBA in bytes, as a canvas
// gives it.
import { resize, resizedSize } from "./resize.mjs";

const [PLACES, STEP, TOLERANCE] = [64, 10007, 1e-4];

/** Of many numbers those that a self-test has. */
export const tested = (values) => Array.from({ length: PLACES }, (_, place) => values[(place * STEP) % values.length]);

/** {prepare, feed, difference}. */
export async function openPreparation(manifest) {
  const rule = manifest.preprocessing;
  const depth = rule.channels.length;
  const values = rule.mean.map((mean, channel) =>
    Float32Array.from({ length: 256 }, (_, level) => (level * rule.rescale_factor - mean) / rule.std[channel]),
  );

  /** {data, shape}: floats [1, channels, height, width]. */
  function prepare(picture) {
    let image = { width: picture.width, height: picture.height, data: channels(picture.data, rule.channels) };
    if (rule.resize) image = resize(image, depth, ...resizedSize(image, rule.resize), rule.resize.filter);
    const { width, height } = rule.center_crop ?? image;
    const [top, left] = [Math.floor((image.height - height) / 2), Math.floor((image.width - width) / 2)];
    const data = new Float32Array(depth * height * width);
    let place = 0;
    for (let channel = 0; channel < depth; channel++) {
      for (let y = top; y < top + height; y++) {
        for (let x = left; x < left + width; x++) {
          const inside = x >= 0 && y >= 0 && x < image.width && y < image.height;
          data[place++] = values[channel][inside ? image.data[(y * image.width + x) * depth + channel] : 0];
        }
      }
    }
    return { data, shape: [1, depth, height, width] };
  }

  /** The model's input: name -> type, values, shape. */
  function feed({ data, shape }) {
    return { [rule.input]: ["float32", data, shape] };
  }

  /** What is other than in a case of the self-test; nothing if it is the same. */
  function difference({ data }, { image, pixels }) {
    const found = pixels.map((_, place) => data[(place * STEP) % data.length]);
    const wrong = found.findIndex((value, place) => !(Math.abs(value - pixels[place]) <= TOLERANCE));
    return wrong < 0 ? "" : `prepared value ${wrong} of ${image} is ${found[wrong]}, expected ${pixels[wrong]}`;
  }

  return { prepare, feed, difference };
}

/** RGBA laid on white, as bytes of the channels that the model takes; whole numbers throughout, as Pillow computes. */
function channels(rgba, order) {
  const depth = order.length;
  const found = new Uint8Array((rgba.length / 4) * depth);
  const [red, blue] = order === "BGR" ? [2, 0] : [0, 2];
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += depth) {
    let [r, g, b] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    const alpha = rgba[from + 3];
    if (alpha < 255) [r, g, b] = [onWhite(r, alpha), onWhite(g, alpha), onWhite(b, alpha)];
    if (depth === 1) {
      found[to] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
    } else {
      found[to + red] = r;
      found[to + 1] = g;
      found[to + blue] = b;
    }
  }
  return found;
}

function onWhite(value, alpha) {
  const sum = 128 * (value * alpha + 255 * (255 - alpha)) + 16384;
  return (((sum >>> 8) + sum) >>> 8) >>> 7;
}
