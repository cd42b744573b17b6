// The page: the words of a text that answer a question are marked here, on this device. Nothing is sent.
import { say, start } from "./shown.mjs";

const [question, context, marked] = ["text", "others", "marked"].map((id) => document.getElementById(id));
const PAUSE_MS = 200;

await start(async (bundle) => {
  let asked = 0;
  async function answer() {
    const mine = ++asked;
    if (!question.value.trim() || !context.value.trim()) {
      marked.replaceChildren();
      say("Type a question, and a text that answers it.");
      return;
    }
    const begun = performance.now();
    const { text, from, to, words } = await bundle.find(question.value, context.value);
    if (mine !== asked) return;
    const found = document.createElement("mark");
    found.textContent = words.slice(from, to + 1).join(" ");
    marked.replaceChildren(`${words.slice(0, from).join(" ")} `, found, ` ${words.slice(to + 1).join(" ")}`);
    document.body.dataset.answer = text;
    say(`Answered in ${(performance.now() - begun).toFixed(1)} ms on this device; nothing was sent.`);
  }

  let waiting;
  for (const field of [question, context]) {
    field.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(answer, PAUSE_MS);
    });
  }
  await answer();
});
