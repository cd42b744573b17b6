// The chat in a page, from the files of this bundle alone; the page imports it, and so may yours.
import { openChat } from "./chat.mjs";
import { json } from "./local.mjs";
import * as library from "./runtime/transformers.min.js";

/** {manifest, json, ids, reply, difference}: see chat.mjs. */
export async function openBundle() {
  const manifest = await json("manifest.json");
  return { manifest, json, ...(await openChat(library, manifest, { device: "wasm" })) };
}
