// Scores on a grid -> the class of each pixel, by `postprocessing` in manifest.json.
import { tested } from "./prepare.mjs";

/** {output, expected, read, tested, methods}. */
export function openEnd({ postprocessing: { output, labels, height: rows, width: columns } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The scores of each class at each place, class after class. */
  const read = (values) => values;

  /** What an app calls; `answer` gives the scores of an input. */
  function methods(answer) {
    /** Uint16Array: the place in the labels of each pixel, row after row, of the picture brought to `width` by `height`. */
    async function segment(picture, width = picture.width, height = picture.height) {
      const scores = await answer(picture);
      const [across, down] = [places(columns, width), places(rows, height)];
      const found = new Uint16Array(width * height);
      const best = new Float32Array(width * height).fill(-Infinity);
      labels.forEach((_, label) => {
        const own = scores.subarray(label * rows * columns, (label + 1) * rows * columns);
        for (let y = 0, at = 0; y < height; y++) {
          const [top, bottom, lower] = down[y];
          for (let x = 0; x < width; x++, at++) {
            const [left, right, further] = across[x];
            const along = (row) => own[row * columns + left] * (1 - further) + own[row * columns + right] * further;
            const score = along(top) * (1 - lower) + along(bottom) * lower;
            if (score > best[at]) [best[at], found[at]] = [score, label];
          }
        }
      });
      return found;
    }
    return { segment };
  }

  return { output, expected, read, tested, methods };
}

/** For each of `after` pixels the two of `before` places beside it, and the share of the second. */
function places(before, after) {
  return Array.from({ length: after }, (_, pixel) => {
    const at = Math.max(((pixel + 0.5) * before) / after - 0.5, 0);
    const first = Math.min(Math.floor(at), before - 1);
    return [first, Math.min(first + 1, before - 1), at - first];
  });
}
