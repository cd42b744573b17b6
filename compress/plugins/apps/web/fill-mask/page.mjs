// The page: what may stand in the place of a mask is told here, on this device. Nothing is sent.
import { ask, clear, say, start } from "./shown.mjs";

const field = document.getElementById("text");
const [MOST, PAUSE_MS] = [8, 120];

await start(async (bundle) => {
  async function answer() {
    const text = field.value;
    if (text.includes(bundle.mask)) return ask(() => bundle.fill(text, MOST), MOST);
    clear();
    say(`Type a sentence with ${bundle.mask} in it.`);
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
