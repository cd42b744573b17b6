// Generate greedily with transformers.js from a local folder, offline: node generate.mjs PACKAGE FOLDER MODEL DTYPE TEXTS N
const [library, folder, model, dtype, texts, count] = process.argv.slice(2);
const { env, AutoTokenizer, AutoModelForCausalLM } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(model);
const decoder = await AutoModelForCausalLM.from_pretrained(model, { dtype });
const numbers = (tensor) => tensor.tolist()[0].map(Number);
const answers = [];
for (const text of JSON.parse(texts)) {
  const inputs = tokenizer(text);
  const whole = await decoder.generate({ ...inputs, do_sample: false, max_new_tokens: Number(count) });
  answers.push({ prompt: numbers(inputs.input_ids), whole: numbers(whole) });
}
console.log(JSON.stringify(answers));
