// Prompts -> ids, by `preprocessing` in manifest.json.
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

/** {ids, fits}; `json` gives a file of the bundle, parsed. */
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

  const { prefix_ids: prefix, suffix_ids: suffix, max_length: length } = rule;
  const room = length - prefix.length - suffix.length;

  function own(text) {
    const clear = classed.reduce((known, [pattern, by]) => known.replace(pattern, by), text);
    return tokenizer.encode(clear, { add_special_tokens: false }).ids;
  }

  /** The ids of a prompt, padded or cut to as many as the model reads. */
  function ids(text) {
    const found = [...prefix, ...own(text).slice(0, room), ...suffix];
    return [...found, ...Array(length - found.length).fill(rule.pad_id)];
  }

  /** Whether nothing of a prompt is cut. */
  const fits = (text) => own(text).length <= room;

  return { ids, fits };
}
