// Embed texts with transformers.js from a local folder, offline: node embed.mjs PACKAGE FOLDER MODEL DTYPE TEXTS
const [library, folder, model, dtype, texts] = process.argv.slice(2);
const { env, pipeline } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const embed = await pipeline("feature-extraction", model, { dtype });
const answers = [];
for (const text of JSON.parse(texts)) answers.push((await embed(text, { pooling: "mean", normalize: true })).tolist()[0]);
console.log(JSON.stringify(answers));
