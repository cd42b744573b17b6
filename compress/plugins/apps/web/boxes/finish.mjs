// Scores and boxes -> what is in a picture, by `postprocessing` in manifest.json.
import { tested as some } from "./prepare.mjs";

/** {output, expected, read, tested, methods}. */
export function openEnd({ postprocessing: { chances, output, boxes_output: boxesOutput, labels, least_score: leastScore } }) {
  const alone = chances === "sigmoid";
  const row = labels.length + (alone ? 0 : 1);
  const queries = (numbers) => numbers.length / (row + 4);

  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The scores of all queries, then their boxes. */
  const read = (scores, boxes) => [...scores, ...boxes];

  /** Of those numbers the ones that a self-test has: where the order of queries says nothing, each column is sorted. */
  function tested(numbers) {
    if (!alone) return some(numbers);
    const [count, sorted] = [queries(numbers), [...numbers]];
    for (const [first, wide] of [[0, row], [count * row, 4]]) {
      for (let column = first; column < first + wide; column++) {
        const values = Float64Array.from({ length: count }, (_, query) => numbers[column + query * wide]).sort();
        values.forEach((value, query) => (sorted[column + query * wide] = value));
      }
    }
    return some(sorted);
  }

  /** [[label's number, probability]] of a query's scores. */
  function likeliest(scores) {
    if (alone) return scores.map((value, label) => [label, 1 / (1 + Math.exp(-value))]);
    const highest = Math.max(...scores);
    const powers = scores.map((value) => Math.exp(value - highest));
    const best = Math.max(...powers.slice(0, -1));
    return [[powers.indexOf(best), best / powers.reduce((a, b) => a + b, 0)]];
  }

  /** What an app calls; `answer` gives those numbers of an input, and `way.prepare` what it takes. */
  function methods(answer) {
    /** [{label, score, box: [left, top, width, height] in pixels}] of a picture, surest first, from `least` on. */
    async function detect(picture, least = leastScore) {
      const numbers = await answer(picture);
      const [count, found] = [queries(numbers), []];
      for (let query = 0; query < count; query++) {
        const [x, y, width, height] = numbers.slice(count * row + 4 * query, count * row + 4 * query + 4);
        const box = [(x - width / 2) * picture.width, (y - height / 2) * picture.height, width * picture.width, height * picture.height];
        for (const [label, score] of likeliest(numbers.slice(query * row, (query + 1) * row))) {
          if (score >= least) found.push({ label: labels[label], score, box });
        }
      }
      return found.sort((a, b) => b.score - a.score).slice(0, count);
    }
    return { detect };
  }

  return { output: [output, boxesOutput], expected, read, tested, methods };
}
