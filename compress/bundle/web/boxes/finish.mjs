// Scores and boxes -> what is in a picture, by `postprocessing` in manifest.json.
import { tested } from "./prepare.mjs";

/** {output, expected, read, tested, methods}. */
export function openEnd({ postprocessing: { output, boxes_output: boxesOutput, labels, least_score: leastScore } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The scores of all queries, then their boxes. */
  const read = (scores, boxes) => [...scores, ...boxes];

  /** What an app calls; `answer` gives those numbers of an input, and `way.prepare` what it takes. */
  function methods(answer) {
    /** [{label, score, box: [left, top, width, height] in pixels}] of a picture, surest first, from `least` on. */
    async function detect(picture, least = leastScore) {
      const numbers = await answer(picture);
      const [row, count] = [labels.length + 1, numbers.length / (labels.length + 5)];
      const found = [];
      for (let query = 0; query < count; query++) {
        const scores = numbers.slice(query * row, (query + 1) * row);
        const highest = Math.max(...scores);
        const powers = scores.map((value) => Math.exp(value - highest));
        const score = Math.max(...powers.slice(0, -1)) / powers.reduce((a, b) => a + b, 0);
        if (score < least) continue;
        const [x, y, width, height] = numbers.slice(count * row + 4 * query, count * row + 4 * query + 4);
        const box = [(x - width / 2) * picture.width, (y - height / 2) * picture.height, width * picture.width, height * picture.height];
        found.push({ label: labels[powers.indexOf(Math.max(...powers.slice(0, -1)))], score, box });
      }
      return found.sort((a, b) => b.score - a.score);
    }
    return { detect };
  }

  return { output: [output, boxesOutput], expected, read, tested, methods };
}
