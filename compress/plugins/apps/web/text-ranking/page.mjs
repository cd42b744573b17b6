// The page: texts are put in order of their relevance to a query here, on this device. Nothing is sent.
import { ask, clear, say, start } from "./shown.mjs";

const [query, others] = ["text", "others"].map((id) => document.getElementById(id));
const [MOST, PAUSE_MS] = [12, 150];

await start(async (bundle) => {
  async function answer() {
    const text = query.value.trim();
    const texts = [...new Set(others.value.split("\n").map((line) => line.trim()))].filter(Boolean);
    if (text && texts.length) return ask(() => bundle.rank(text, texts), MOST, (score) => score.toFixed(3));
    clear();
    say("Type a query, and texts to put in order.");
  }

  let waiting;
  for (const field of [query, others]) {
    field.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(answer, PAUSE_MS); // a query is asked once, not for each of its letters
    });
  }
  await answer();
});
