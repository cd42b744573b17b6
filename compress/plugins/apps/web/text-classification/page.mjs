// The page: what is typed is answered here, on this device. Nothing is sent.
import { ask, clear, say, start } from "./shown.mjs";

const field = document.getElementById("text");
const MOST = 12;

await start(async (bundle) => {
  const answer = async () => {
    const text = field.value;
    if (text.trim()) return ask(() => bundle.classify(text), MOST);
    clear();
    say("Type a sentence.");
  };
  field.addEventListener("input", answer);
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      field.value = button.textContent;
      answer();
    });
  }
  await answer();
});
