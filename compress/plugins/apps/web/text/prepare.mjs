// Texts -> ids, by `preprocessing` in manifest.json.
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

/** {prepare, feed, difference}; `json` gives a file of the bundle, parsed. */
export async function openPreparation(manifest, json) {
  const rule = manifest.preprocessing;
  const config = rule.tokenizer.replace("tokenizer.json", "tokenizer_config.json");
  // Characters that this tokenizer would class by other tables than the one that the model learned with.
  const listed = "stand_ins.json" in manifest.files ? json("stand_ins.json") : [];
  const [definition, settings, standIns] = await Promise.all([json(rule.tokenizer), json(config), listed]);
  const tokenizer = new Tokenizer({ ...definition, truncation: null, padding: null }, settings);
  const code = (point) => `\\u{${point.toString(16)}}`;
  const classed = standIns.map(({ ranges, by }) => [
    new RegExp(`[${ranges.map(([first, last]) => `${code(first)}-${code(last)}`).join("")}]`, "gu"),
    by,
  ]);

  /** A text's own ids, however many. */
  function ownIds(text) {
    const clear = classed.reduce((known, [pattern, by]) => known.replace(pattern, by), text);
    return tokenizer.encode(clear, { add_special_tokens: false }).ids;
  }

  /** The ids of a text: special ones before and after as many of its own as there is room for. */
  function prepare(text) {
    const { prefix_ids: prefix, suffix_ids: suffix } = rule;
    const own = ownIds(text);
    return [...prefix, ...own.slice(0, rule.max_length - prefix.length - suffix.length), ...suffix];
  }

  /** The inputs that a model may have: name -> type, values, shape. */
  function feed(ids) {
    const row = (values) => ["int64", BigInt64Array.from(values, BigInt), [1, values.length]];
    return { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
  }

  /** What is other than in a case of the self-test; nothing if it is the same. */
  function difference(ids, { text, input_ids: expected }) {
    return String(ids) === String(expected) ? "" : `other ids of ${JSON.stringify(text.slice(0, 40))}: ${ids}`;
  }

  /** The text of one token. */
  const word = (id) => tokenizer.decode([id]);

  return { prepare, feed, difference, ownIds, word };
}
