// Replies token by token, by manifest.json; `library` is transformers.js. The page and examples/run.mjs share this file.
const DTYPES = { quantized: "q8", q4: "q4", q2: "q2", fp16: "fp16" };
// Between two tokens, so that a page can show the one and hear that it shall stop.
const pause = () => new Promise((go) => setTimeout(go));

/** {ids, reply, difference}; `options` go to the model. */
export async function openChat(library, { model: file, preprocessing: rule, postprocessing: end }, options = {}) {
  const { AutoModelForCausalLM, AutoTokenizer, GenerationConfig, InterruptableStoppingCriteria, Tensor } = library;
  const [, kind] = file.match(/(?:_([a-z0-9]+))?\.onnx$/);
  const [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained("model"),
    AutoModelForCausalLM.from_pretrained("model", { dtype: DTYPES[kind] ?? "fp32", ...options }),
  ]);
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await pause();
    return forward(inputs);
  };

  /** The ids of a message's prompt. Throws for one that is too long, or nothing. */
  function ids(message) {
    const found = tokenizer.encode(rule.before + message + rule.after, { add_special_tokens: rule.add_special_tokens });
    if (!found.length) throw new RangeError("There is nothing to continue.");
    if (found.length > rule.max_length) {
      throw new RangeError(`This has ${found.length} tokens; the model takes ${rule.max_length} at most.`);
    }
    return found;
  }

  const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const generate = (prompt, most, more) =>
    model.generate({
      input_ids: row(prompt),
      attention_mask: row(prompt.map(() => 1)),
      // All of its fields, so that nothing of generation_config.json holds: no penalties, and nothing drawn at random.
      generation_config: new GenerationConfig({ eos_token_id: end.end_ids.length ? end.end_ids : null, max_new_tokens: most }),
      ...more,
    });
  // A character of several tokens isn't whole before the last of them.
  const text = (said) =>
    tokenizer.decode(said, { skip_special_tokens: true, clean_up_tokenization_spaces: false }).replace(/\uFFFD+$/, "");

  /** {ids, text} of the reply; `told(text, tokens)` is called at each token, and `signal` stops it. */
  async function reply(message, told = () => {}, signal = undefined) {
    const prompt = ids(message);
    const said = [];
    let begun = false;
    const streamer = {
      put([tokens]) {
        if (begun) {
          said.push(...tokens.map(Number));
          told(text(said), said.length);
        }
        begun = true; // the prompt comes first
      },
      end() {},
    };
    const stopping = new InterruptableStoppingCriteria();
    signal?.addEventListener("abort", () => stopping.interrupt());
    const most = Math.min(end.max_new_tokens, end.max_length - prompt.length);
    await generate(prompt, most, { streamer, stopping_criteria: [stopping] });
    return { ids: said, text: text(said) };
  }

  /**
   * How far the model is from a case of the self-test, to be held against the tolerance. Each token of the reply is read
   * as it is expected: by how much its logit exceeds the mean otherwise, or is behind the largest. Throws for other ids.
   */
  async function difference({ text: message, input_ids: expected, reply: known }) {
    const prompt = ids(message);
    if (String(prompt) !== String(expected)) throw new Error(`other ids of ${JSON.stringify(message.slice(0, 40))}: ${prompt}`);
    const apart = [];
    const follow = (_, logits) => {
      const [values, place] = [logits.data, apart.length / 2];
      const token = known.ids[place];
      let [sum, largest] = [0, -Infinity];
      for (const value of values) {
        sum += value;
        if (value > largest) largest = value;
      }
      apart.push(Math.abs(values[token] - sum / values.length - known.logits[place]), largest - values[token]);
      values.fill(-Infinity);
      values[token] = 0;
      return logits;
    };
    await generate(prompt, known.ids.length, { logits_processor: [follow] });
    if (apart.length !== 2 * known.ids.length) throw new Error(`a reply of ${apart.length / 2} tokens: ${known.ids}`);
    return Math.max(...apart);
  }

  return { ids, reply, difference };
}
