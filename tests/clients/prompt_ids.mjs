// Ids of prompts by transformers.js, offline: node prompt_ids.mjs PACKAGE FOLDER MODEL LINES.json
import { readFile } from "node:fs/promises";
const [library, folder, model, lines] = process.argv.slice(2);
const { env, AutoTokenizer } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(model);
const asked = JSON.parse(await readFile(lines, "utf8"));
console.log(JSON.stringify(asked.map((line) => tokenizer.encode(line, { add_special_tokens: false }))));
