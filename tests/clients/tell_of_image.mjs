// Answer questions about images with transformers.js from a local folder, offline:
// node tell_of_image.mjs PACKAGE FOLDER MODEL DTYPE BATCHES N; a batch has input_ids, and pixel_values with their dims
const [library, folder, model, dtype, batches, count] = process.argv.slice(2);
const { env, AutoModelForImageTextToText, Tensor } = await import(library);
env.allowRemoteModels = false;
env.localModelPath = folder;
const reader = await AutoModelForImageTextToText.from_pretrained(model, { dtype });
const integers = (values) => new Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length]);
const answers = [];
for (const { ids, pixels, dims } of JSON.parse(batches)) {
  const inputs = {
    input_ids: integers(ids),
    attention_mask: integers(ids.map(() => 1)),
    pixel_values: new Tensor("float32", Float32Array.from(pixels), dims),
  };
  const whole = await reader.generate({ ...inputs, do_sample: false, max_new_tokens: Number(count) });
  answers.push(whole.tolist()[0].map(Number));
}
console.log(JSON.stringify(answers));
