// The page: a recording that is chosen, dropped or spoken is heard here, on this device. Nothing is sent.
import { openBundle } from "./answer.mjs";
import { listen, samplesOf } from "./recording.mjs";
import { wordErrors } from "./words.mjs";

const [words, status] = ["words", "status"].map((id) => document.getElementById(id));
let asked = 0;
let bundle;

function say(line, failed = false) {
  status.textContent = line;
  status.className = failed ? "failed" : "";
}

async function answer(blob) {
  const mine = ++asked;
  words.textContent = "";
  say("Listening ...");
  const start = performance.now();
  let samples;
  try {
    samples = await samplesOf(blob, bundle.manifest.preprocessing);
  } catch (error) {
    say(`This is no recording that the browser can play (${error.message}).`, true);
    return;
  }
  const text = await bundle.transcribe(samples);
  if (mine !== asked) return;
  const seconds = samples.length / bundle.manifest.preprocessing.sampling_rate;
  words.textContent = text || "(nothing)";
  say(`${seconds.toFixed(1)} s heard in ${((performance.now() - start) / 1000).toFixed(1)} s on this device; nothing was sent.`);
  if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
  document.body.dataset.answer = text;
}

const file = async (path) => (await fetch(path)).blob();

/** Every case of the self-test; the largest share of words that are others. Throws where that is too large. */
export async function tryAll() {
  await ready;
  const test = await bundle.json("selftest.json");
  let worst = 0;
  for (const { recording, transcript } of test.cases) {
    const text = await bundle.transcribe(await samplesOf(await file(recording), bundle.manifest.preprocessing));
    const apart = wordErrors(transcript, text);
    if (!(apart <= test.tolerance)) throw new Error(`${recording}: ${text}, expected ${transcript}`);
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
  say("Ready.");
  listen(answer, say);
}
const ready = start();
