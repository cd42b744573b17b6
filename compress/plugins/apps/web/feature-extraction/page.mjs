// The page: which of some sentences is nearest to a question is found here, on this device. Nothing is sent.
import { cosine } from "./answer.mjs";
import { ask, clear, say, start } from "./shown.mjs";

const [question, others] = ["text", "others"].map((id) => document.getElementById(id));
const [MOST, PAUSE_MS] = [12, 150];

await start(async (bundle) => {
  const known = new Map();
  async function embedding(text) {
    if (!known.has(text)) known.set(text, await bundle.embed(text));
    return known.get(text);
  }

  async function nearest(text, sentences) {
    const own = await embedding(text);
    const found = [];
    for (const sentence of sentences) found.push({ label: sentence, score: cosine(own, await embedding(sentence)) });
    return found.sort((a, b) => b.score - a.score);
  }

  async function answer() {
    const text = question.value.trim();
    const sentences = [...new Set(others.value.split("\n").map((line) => line.trim()))].filter(Boolean);
    if (text && sentences.length) return ask(() => nearest(text, sentences), MOST, (score) => score.toFixed(3));
    clear();
    say("Type a question, and sentences that may answer it.");
  }

  let waiting;
  for (const field of [question, others]) {
    field.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(answer, PAUSE_MS); // a question is asked once, not for each of its letters
    });
  }
  await answer();
});
