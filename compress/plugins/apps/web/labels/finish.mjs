// Scores -> labels, by `postprocessing` in manifest.json.

/** {output, expected, read, methods}. */
export function openEnd({ postprocessing: { output, labels } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The model's scores, one a label, of its output for one input. */
  const read = (values) => Array.from(values);

  /** What an app calls; `answer` gives the scores of an input. */
  function methods(answer) {
    /** [{label, score}] of an input, likeliest first; scores sum to 1. */
    async function classify(input) {
      const scores = await answer(input);
      const highest = Math.max(...scores);
      const powers = scores.map((value) => Math.exp(value - highest));
      const sum = powers.reduce((a, b) => a + b, 0);
      return labels.map((label, index) => ({ label, score: powers[index] / sum })).sort((a, b) => b.score - a.score);
    }
    return { classify };
  }

  return { output, expected, read, methods };
}
