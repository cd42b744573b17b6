// The page: a text is written from another here, on this device. Nothing is sent.
import { openBundle } from "./answer.mjs";
import { wordErrors } from "./words.mjs";

const [text, words, status] = ["text", "words", "status"].map((id) => document.getElementById(id));
const PAUSE_MS = 400;
let asked = 0;
let bundle;

function say(line, failed = false) {
  status.textContent = line;
  status.className = failed ? "failed" : "";
}

async function answer() {
  const mine = ++asked;
  words.textContent = "";
  if (!text.value.trim()) return say("Type a text.");
  say("Writing ...");
  const start = performance.now();
  const written = await bundle.rewrite(text.value);
  if (mine !== asked) return;
  words.textContent = written || "(nothing)";
  say(`Written in ${((performance.now() - start) / 1000).toFixed(1)} s on this device; nothing was sent.`);
  if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
  document.body.dataset.answer = written;
}

/** Every case of the self-test; the largest share of words that are others. Throws where that is too large. */
export async function tryAll() {
  await ready;
  const test = await bundle.json("selftest.json");
  let worst = 0;
  for (const known of test.cases) {
    const found = bundle.ids(known.text);
    if (String(found) !== String(known.input_ids)) throw new Error(`other ids of ${known.text.slice(0, 40)}: ${found}`);
    const written = await bundle.rewrite(known.text);
    const apart = wordErrors(known.written, written);
    if (!(apart <= test.tolerance)) throw new Error(`${known.text.slice(0, 40)}: ${written}, expected ${known.written}`);
    worst = Math.max(worst, apart);
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
  let waiting;
  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(answer, PAUSE_MS); // a text is written for once, not for each of its letters
  });
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      text.value = button.textContent;
      return answer();
    });
  }
  await answer();
}
const ready = start();
