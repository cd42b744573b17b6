// What the pages of all models share: files over HTTP, answers as bars, and a word where something fails.
import { openBundle, wasm } from "./answer.mjs";

const [status, bars] = ["status", "bars"].map((id) => document.getElementById(id));
wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };

async function read(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

/** Opens the bundle, shows why not where it can't, and runs `use` with it. */
export async function start(use) {
  try {
    const bundle = await openBundle(read);
    document.body.dataset.ready = "yes";
    await use(bundle);
  } catch (error) {
    say(`The model could not be opened: ${error.message}`, true);
    throw error;
  }
}

/** A line below the answers. */
export function say(words, failed = false) {
  status.textContent = words;
  status.className = failed ? "failed" : "";
}

const percent = (score) => `${(100 * score).toFixed(1)}%`;

/**
 * Asks for `answer()`, [{label, score}], and shows at most `most` of them, their scores as `words` has them, unless
 * something newer was asked meanwhile. Those with a `source` are shown as its picture, bars are of a `colour`.
 */
export async function ask(answer, most, words = percent) {
  const mine = ++asked;
  const start = performance.now();
  const answers = await answer();
  if (mine !== asked) return;
  show(answers.slice(0, most), words);
  say(`Answered in ${(performance.now() - start).toFixed(1)} ms on this device; nothing was sent.`);
  if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
  document.body.dataset.answer = answers[0]?.label ?? "(nothing)";
}
let asked = 0;

/** No answers, and none of those that are under way. */
export function clear() {
  asked++;
  bars.replaceChildren();
}

function show(answers, words) {
  bars.replaceChildren(
    ...answers.map(({ label, score, source, colour }, place) => {
      const row = document.createElement("div");
      row.className = place ? "bar" : "bar first";
      const [name, track, fill, figure] = ["span", "div", "div", "span"].map((kind) => document.createElement(kind));
      name.textContent = label;
      if (source) name.prepend(Object.assign(new Image(), { src: source, alt: "" }));
      track.className = "track";
      fill.style.width = `${100 * Math.max(0, score)}%`;
      if (colour) fill.style.background = `rgb(${colour})`;
      track.append(fill);
      figure.textContent = words(score);
      row.append(name, track, figure);
      return row;
    }),
  );
}
