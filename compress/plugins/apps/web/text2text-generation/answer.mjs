// Texts from texts in a page, from the files of this bundle alone; the page imports it, and so may yours.
import { json, typesOf } from "./local.mjs";
import { openWriter } from "./rewrite.mjs";
import * as library from "./runtime/transformers.min.js";

/** {manifest, json, ids, rewrite}: see rewrite.mjs. */
export async function openBundle() {
  const manifest = await json("manifest.json");
  return { manifest, json, ...(await openWriter(library, manifest, { dtype: typesOf(manifest), device: "wasm" })) };
}
