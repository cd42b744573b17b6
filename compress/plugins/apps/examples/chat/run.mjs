// Replies to a message offline, in Node: node examples/run.mjs "Hello"  (--selftest: as it was tested)
// Needs: npm install @huggingface/transformers@4.3.1, which brings ONNX Runtime for this machine.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import * as library from "@huggingface/transformers";
import { openChat } from "../chat.mjs";

const local = (path) => new URL(`../${path}`, import.meta.url);
const json = async (path) => JSON.parse(await readFile(local(path), "utf8"));
library.env.allowRemoteModels = false;
library.env.localModelPath = fileURLToPath(local("."));
const chat = await openChat(library, await json("manifest.json"));

const message = process.argv.slice(2).join(" ");
if (message === "--selftest") {
  const { cases, tolerance } = await json("selftest.json");
  let worst = 0;
  for (const known of cases) {
    const apart = await chat.difference(known);
    if (!(apart <= tolerance)) throw new Error(`the reply to ${known.text} is ${apart} apart; ${tolerance} is allowed`);
    worst = Math.max(worst, apart);
  }
  console.log(`passed; replies differ by at most ${worst.toPrecision(3)}, ${tolerance} is allowed`);
} else {
  let shown = "";
  const show = (text) => {
    process.stdout.write(text.slice(shown.length));
    shown = text;
  };
  show((await chat.reply(message, show)).text);
  process.stdout.write("\n");
}
