// Texts from texts, by manifest.json; `library` is transformers.js. The page and examples/run.mjs share this file.

/** {ids, rewrite}; `options` go to the model. */
export async function openWriter(library, { preprocessing: rule, postprocessing: end }, options) {
  const { AutoModelForSeq2SeqLM, AutoTokenizer, Tensor } = library;
  const [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained("model"),
    AutoModelForSeq2SeqLM.from_pretrained("model", options),
  ]);

  /** The ids of a text: special ones before and after as many of its own as there is room for. */
  function ids(text) {
    const room = rule.max_length - rule.prefix_ids.length - rule.suffix_ids.length;
    const own = tokenizer.encode(text, { add_special_tokens: false }).slice(0, room);
    return [...rule.prefix_ids, ...own, ...rule.suffix_ids];
  }

  /** What the model writes for a text. */
  async function rewrite(text) {
    const given = ids(text);
    const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const found = await model.generate({
      inputs: row(given),
      attention_mask: row(given.map(() => 1)),
      max_length: end.max_length,
    });
    return tokenizer.decode(Array.from(found.data, Number), { skip_special_tokens: true });
  }

  return { ids, rewrite };
}
