// Two texts -> ids of one input, by `preprocessing` in manifest.json.
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

/** {prepare, feed, difference, ownIds, assemble, room}; `json` gives a file of the bundle, parsed. */
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
  const { prefix_ids: prefix, middle_ids: middle, suffix_ids: suffix } = rule;
  /** Tokens that both texts may have together. */
  const room = rule.max_length - prefix.length - middle.length - suffix.length;

  /** A text's own ids, however many. */
  function ownIds(text) {
    const clear = classed.reduce((known, [pattern, by]) => known.replace(pattern, by), text);
    return tokenizer.encode(clear, { add_special_tokens: false }).ids;
  }

  /** {ids, types} of both texts' own ids, which are few enough. */
  function assemble(first, second) {
    const [head, tail] = [[...prefix, ...first, ...middle], [...second, ...suffix]];
    return { ids: [...head, ...tail], types: [...head.map(() => 0), ...tail.map(() => 1)] };
  }

  /** {ids, types} of {text, pair}: the second one is cut at its end, or the longer one. */
  function prepare({ text, pair }) {
    const [first, second] = [ownIds(text), ownIds(pair)];
    if (first.length + second.length <= room) return assemble(first, second);
    if (rule.truncation === "only-second") return assemble(first, second.slice(0, Math.max(room - first.length, 0)));
    const short = Math.min(first.length, second.length);
    const one = 2 * short <= room ? short : Math.floor(room / 2);
    const [left, right] = first.length <= second.length ? [one, room - one] : [room - one, one];
    return assemble(first.slice(0, left), second.slice(0, right));
  }

  /** The inputs that a model may have: name -> type, values, shape. */
  function feed({ ids, types }) {
    const row = (values) => ["int64", BigInt64Array.from(values, BigInt), [1, values.length]];
    return { input_ids: row(ids), attention_mask: row(ids.map(() => 1)), token_type_ids: row(types) };
  }

  /** What is other than in a case of the self-test; nothing if it is the same. */
  function difference({ ids }, { text, input_ids: expected }) {
    return String(ids) === String(expected) ? "" : `other ids of ${JSON.stringify(text.slice(0, 40))}: ${ids}`;
  }

  return { prepare, feed, difference, ownIds, assemble, room };
}
