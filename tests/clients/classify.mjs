// Classify texts with transformers.js from a local folder, offline: node classify.mjs PACKAGE FOLDER MODEL DTYPE TEXTS
const [library, folder, model, dtype, texts] = process.argv.slice(2);
const { env, pipeline } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const classify = await pipeline("text-classification", model, { dtype });
const answers = [];
for (const text of JSON.parse(texts)) answers.push((await classify(text, { top_k: 1 }))[0]);
console.log(JSON.stringify(answers));
