// Prompts -> ids, by `preprocessing` in manifest.json.
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

/** Gives the function from a prompt to its ids; `json` gives a file of the bundle, parsed. */
export async function openPrompts(manifest, json) {
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

  return (text) => {
    const { prefix_ids: prefix, suffix_ids: suffix, max_length: length } = rule;
    const clear = classed.reduce((known, [pattern, by]) => known.replace(pattern, by), text);
    const own = tokenizer.encode(clear, { add_special_tokens: false }).ids;
    const ids = [...prefix, ...own.slice(0, length - prefix.length - suffix.length), ...suffix];
    return [...ids, ...Array(length - ids.length).fill(rule.pad_id)];
  };
}
