// How far a text is from another.

/** The share of `expected`'s words that would have to be changed, added or left out. */
export function wordErrors(expected, text) {
  const [a, b] = [expected, text].map((words) => words.split(/\s+/).filter(Boolean));
  let row = b.map((_, at) => at + 1);
  a.forEach((word, place) => {
    let [left, above] = [place + 1, place];
    row = row.map((up, at) => {
      left = Math.min(above + (word !== b[at]), up + 1, left + 1);
      above = up;
      return left;
    });
  });
  return (b.length ? row.at(-1) : a.length) / Math.max(1, a.length);
}
