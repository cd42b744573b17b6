// The page: what is typed is marked here, on this device. Nothing is sent.
import { say, start } from "./shown.mjs";

const [field, marked] = ["text", "marked"].map((id) => document.getElementById(id));
const PAUSE_MS = 120;

function shown({ text, kind }) {
  if (!kind) return document.createTextNode(`${text} `);
  const mark = document.createElement("mark");
  const name = document.createElement("small");
  name.textContent = kind;
  mark.append(`${text} `, name);
  return mark;
}

await start(async (bundle) => {
  let asked = 0;
  async function answer() {
    const mine = ++asked;
    const begun = performance.now();
    const found = await bundle.entities(field.value);
    if (mine !== asked) return;
    marked.replaceChildren(...found.flatMap((part) => [shown(part), " "]));
    const named = found.filter(({ kind }) => kind);
    document.body.dataset.answer = named.map(({ text, kind }) => `${text}: ${kind}`).join("; ");
    const [count, time] = [named.length, (performance.now() - begun).toFixed(1)];
    say(found.length ? `${count} found in ${time} ms on this device; nothing was sent.` : "Type a sentence.");
  }

  let waiting;
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(answer, PAUSE_MS);
  });
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      field.value = button.textContent;
      answer();
    });
  }
  await answer();
});
