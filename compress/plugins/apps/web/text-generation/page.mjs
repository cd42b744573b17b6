// The page: a message is answered here, on this device, token by token. Nothing is sent.
import { openBundle } from "./answer.mjs";

const [text, send, words, status] = ["text", "send", "words", "status"].map((id) => document.getElementById(id));
let bundle;
let running; // stops the reply that is being written

function say(line, failed = false) {
  status.textContent = line;
  status.className = failed ? "failed" : "";
}

async function answer(message) {
  const mine = new AbortController();
  running = mine;
  send.textContent = "Stop";
  words.textContent = "";
  delete document.body.dataset.answer;
  say("Reading ...");
  const start = performance.now();
  let first;
  try {
    const { ids, text: said } = await bundle.reply(
      message,
      (sofar) => {
        first ??= performance.now();
        words.textContent = sofar;
        if (!mine.signal.aborted) say("Writing ...");
        if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
      },
      mine.signal,
    );
    words.textContent = said || "(nothing)";
    const now = performance.now();
    const rate = ids.length > 1 ? `, then ${((ids.length - 1) / ((now - first) / 1000)).toFixed(1)} a second` : "";
    const count = ids.length === 1 ? "1 token" : `${ids.length} tokens`;
    say(`${count}: the first after ${((first - start) / 1000).toFixed(1)} s${rate}, on this device; nothing was sent.`);
    document.body.dataset.answer = JSON.stringify(ids);
  } catch (error) {
    say(error.message, true);
    if (!(error instanceof RangeError)) throw error;
  } finally {
    running = undefined;
    send.textContent = "Send";
  }
}

/** Every case of the self-test; the largest difference, in tolerances. Throws where that is too large. */
export async function tryAll() {
  await ready;
  const test = await bundle.json("selftest.json");
  let worst = 0;
  for (const known of test.cases) {
    const apart = await bundle.difference(known);
    if (!(apart <= test.tolerance)) {
      throw new Error(`the reply to ${JSON.stringify(known.text)} is ${apart} apart, ${test.tolerance} is allowed`);
    }
    worst = Math.max(worst, apart / test.tolerance);
  }
  return worst;
}

async function start() {
  try {
    bundle = await openBundle();
  } catch (error) {
    say(`The model could not be opened: ${error.message}`, true);
    throw error;
  }
  document.body.dataset.ready = "yes";
  send.disabled = false;
  say("Ready.");
  send.addEventListener("click", () => (running ? running.abort() : answer(text.value)));
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) answer(text.value);
  });
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      if (running) return;
      text.value = button.textContent;
      answer(text.value);
    });
  }
}
const ready = start();
