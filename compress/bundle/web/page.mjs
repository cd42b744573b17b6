// The page: what is typed is answered here, on this device. Nothing is sent.
import { openBundle, wasm } from "./answer.mjs";

wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
const [field, status, bars] = ["text", "status", "bars"].map((id) => document.getElementById(id));
const read = async (path) => {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
};

function show(answers) {
  bars.replaceChildren(
    ...answers.map(({ label, score }, place) => {
      const row = document.createElement("div");
      row.className = place ? "bar" : "bar first";
      const [name, track, fill, figure] = ["span", "div", "div", "span"].map((kind) => document.createElement(kind));
      name.textContent = label;
      track.className = "track";
      fill.style.width = `${100 * score}%`;
      track.append(fill);
      figure.textContent = `${(100 * score).toFixed(1)}%`;
      row.append(name, track, figure);
      return row;
    }),
  );
}

let asked = 0;
async function answer(bundle) {
  const mine = ++asked;
  const text = field.value;
  if (!text.trim()) {
    bars.replaceChildren();
    status.textContent = "Type a sentence.";
    return;
  }
  const start = performance.now();
  const answers = await bundle.classify(text);
  if (mine !== asked) return; // something newer was typed meanwhile
  show(answers);
  status.textContent = `Answered in ${(performance.now() - start).toFixed(1)} ms on this device; nothing was sent.`;
  if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
  document.body.dataset.answer = answers[0].label;
}

try {
  const bundle = await openBundle(read);
  document.body.dataset.ready = "yes";
  field.addEventListener("input", () => answer(bundle));
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      field.value = button.textContent;
      answer(bundle);
    });
  }
  await answer(bundle);
} catch (error) {
  status.textContent = `The model could not be opened: ${error.message}`;
  status.className = "failed";
  throw error;
}
