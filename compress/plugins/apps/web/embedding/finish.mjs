// Vectors of a text's tokens -> its embedding, by `postprocessing` in manifest.json.

/** {output, expected, read, methods}. */
export function openEnd({ postprocessing: { output, pooling, normalize, dimensions } }) {
  /** The answer that a case of the self-test expects. */
  const expected = ({ embedding }) => embedding;

  /** The embedding, of the model's output for one text. */
  function read(values) {
    const found = pooling === null ? Array.from(values) : pooled(values, pooling, dimensions);
    const length = normalize ? Math.hypot(...found) : 1;
    return found.map((value) => value / length);
  }

  /** What an app calls: `embed(text)`, whose embeddings are compared by `cosine` of answer.mjs. */
  const methods = (answer) => ({ embed: answer });

  return { output, expected, read, methods };
}

/** One vector of those of the tokens, which stand one after the other. */
function pooled(values, pooling, dimensions) {
  const vectors = Array.from({ length: values.length / dimensions }, (_, token) =>
    values.slice(token * dimensions, (token + 1) * dimensions),
  );
  if (pooling === "cls") return Array.from(vectors[0]);
  if (pooling === "lasttoken") return Array.from(vectors.at(-1));
  return Array.from({ length: dimensions }, (_, at) => {
    const column = vectors.map((vector) => vector[at]);
    return pooling === "max" ? Math.max(...column) : column.reduce((a, b) => a + b, 0) / column.length;
  });
}
