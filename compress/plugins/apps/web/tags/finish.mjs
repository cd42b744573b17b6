// Scores -> a label for each word, by `postprocessing` in manifest.json.

/** {output, expected, read, methods}. */
export function openEnd({ preprocessing: { prefix_ids: prefix, suffix_ids: suffix }, postprocessing: { output, labels } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The model's scores, one a label, token after token. */
  const read = (values) => Array.from(values);

  /** What an app calls; `answer` gives the scores of an input, `way` prepared it. */
  function methods(answer, way) {
    /** [{word, label, score}] of a text's words; words that are cut off are missing. */
    async function tag(text) {
      const words = text.split(/\s+/u).filter(Boolean);
      if (!words.length) return [];
      const scores = await answer(words.join(" "));
      const found = [];
      let place = prefix.length;
      for (const [at, word] of words.entries()) {
        const tokens = way.ownIds(at ? ` ${word}` : word).length;
        const own = scores.slice(place * labels.length, (place + 1) * labels.length);
        if (place >= scores.length / labels.length - suffix.length) break;
        place += tokens;
        if (!tokens) {
          found.push({ word, label: "O", score: 1 });
          continue;
        }
        const highest = Math.max(...own);
        const sum = own.reduce((all, value) => all + Math.exp(value - highest), 0);
        found.push({ word, label: labels[own.indexOf(highest)], score: 1 / sum });
      }
      return found;
    }

    /** [{text, kind, words}] of a text: entities, and the words between them, whose kind is "". */
    async function entities(text) {
      const found = [];
      for (const { word, label } of await tag(text)) {
        const [mark, kind] = label === "O" ? ["O", ""] : label.includes("-") ? split(label) : ["U", label];
        const last = found.at(-1);
        if (last && last.kind === kind && !last.ended && !"BUS".includes(mark)) {
          last.words.push(word);
        } else {
          found.push({ kind, words: [word] });
        }
        found.at(-1).ended = "ELUS".includes(mark);
      }
      return found.map(({ kind, words }) => ({ kind, words, text: words.join(" ") }));
    }

    return { tag, entities };
  }

  return { output, expected, read, methods };
}

const split = (label) => [label.slice(0, label.indexOf("-")), label.slice(label.indexOf("-") + 1)];
