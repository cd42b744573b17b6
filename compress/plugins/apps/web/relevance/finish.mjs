// Logits -> how relevant a text is, by `postprocessing` in manifest.json.

/** {output, expected, read, methods}. */
export function openEnd({ postprocessing: { output } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The model's logits: one, or that of not being relevant and that of being so. */
  const read = (values) => Array.from(values);

  /** What an app calls; `answer` gives the logits of {text, pair}. */
  function methods(answer) {
    /** From 0 to 1. */
    async function relevance(text, pair) {
      const logits = await answer({ text, pair });
      return 1 / (1 + Math.exp(-(logits.length > 1 ? logits[1] - logits[0] : logits[0])));
    }

    /** [{label, score}] of some texts, the most relevant first. */
    async function rank(query, texts) {
      const found = [];
      for (const label of texts) found.push({ label, score: await relevance(query, label) });
      return found.sort((a, b) => b.score - a.score);
    }

    return { relevance, rank };
  }

  return { output, expected, read, methods };
}
