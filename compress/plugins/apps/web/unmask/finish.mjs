// Scores -> the likeliest tokens in the place of a mask, by `postprocessing` in manifest.json.

/** {output, expected, read, tested, methods}. */
export function openEnd({ postprocessing: { output, mask, mask_id: maskId, tested_ids: testedIds } }) {
  /** The answer that a case of the self-test expects, of some tokens. */
  const expected = ({ logits }) => logits;

  /** The scores of those tokens among all. */
  const tested = (scores) => testedIds.map((id) => scores[id]);

  /** The score of each token at the first mask. */
  function read(values, ids) {
    const [place, size] = [ids.indexOf(maskId), values.length / ids.length];
    if (place < 0) throw new Error(`there is no ${mask} in the text, or it is cut off`);
    return Array.from(values.slice(place * size, (place + 1) * size));
  }

  /** What an app calls; `answer` gives the scores of an input, `way` prepared it. */
  function methods(answer, way) {
    /** [{label, score}] of the `most` likeliest tokens; the scores of all sum to 1. */
    async function fill(text, most = 5) {
      const scores = await answer(text);
      const highest = scores.reduce((all, value) => Math.max(all, value), -Infinity);
      const sum = scores.reduce((all, value) => all + Math.exp(value - highest), 0);
      const first = scores.map((_, id) => id).sort((a, b) => scores[b] - scores[a]).slice(0, most);
      return first.map((id) => ({ label: way.word(id).trim(), score: Math.exp(scores[id] - highest) / sum }));
    }
    return { fill, mask };
  }

  return { output, expected, tested, read, methods };
}
