// Scores -> the words that answer a question, by `postprocessing` in manifest.json.

/** {output, expected, read, methods}. */
export function openEnd({ preprocessing, postprocessing: { output, end_output: endOutput, max_tokens: most } }) {
  const { prefix_ids: prefix, middle_ids: middle } = preprocessing;

  /** The answer that a case of the self-test expects. */
  const expected = ({ logits }) => logits;

  /** The scores of being the first token, then those of being the last. */
  const read = (first, last) => [...first, ...last];

  /** What an app calls; `ask` gives the scores of what `way` prepared. */
  function methods(_, way, ask) {
    /** {text, from, to, score}: the words `from` to `to` of the context, without the marks around them. */
    async function find(question, context) {
      const asked = way.ownIds(question);
      const words = context.split(/\s+/u).filter(Boolean);
      const [ids, owners] = [[], []];
      for (const [at, word] of words.entries()) {
        const own = way.ownIds(at ? ` ${word}` : word);
        ids.push(...own);
        owners.push(...own.map(() => at));
      }
      const room = way.room - asked.length;
      if (room < 6) throw new Error("the question leaves no room for a text");
      let best = { score: -Infinity, from: 0, to: 0 };
      for (let begin = 0; begin < ids.length; begin += room - Math.floor(room / 3)) {
        const some = ids.slice(begin, begin + room);
        const scores = await ask(way.assemble(asked, some));
        const [length, shift] = [scores.length / 2, prefix.length + asked.length + middle.length];
        for (let first = 0; first < some.length; first++) {
          for (let last = first; last < Math.min(first + most, some.length); last++) {
            const score = scores[shift + first] + scores[length + shift + last];
            if (score > best.score) best = { score, from: owners[begin + first], to: owners[begin + last] };
          }
        }
        if (begin + room >= ids.length) break;
      }
      const text = words.slice(best.from, best.to + 1).join(" ");
      return { ...best, text: text.replace(/^[\p{P}]+|[\p{P}]+$/gu, ""), words };
    }

    return { find };
  }

  return { output: [output, endOutput], expected, read, methods };
}
