// The page: a prompt is typed and drawn here, on this device. Nothing is sent.
import { openBundle, selftest, wasm } from "./answer.mjs";

const [text, seed, again, progress, picture, status] = ["text", "seed", "again", "progress", "picture", "status"].map(
  (id) => document.getElementById(id),
);
wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
const PAUSE_MS = 400;
let asked = 0;
let bundle;

function say(line, failed = false) {
  status.textContent = line;
  status.className = failed ? "failed" : "";
}

async function read(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

function show({ levels, width, height, channels }) {
  const pixels = new ImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    for (let channel = 0; channel < 3; channel++) {
      pixels.data[4 * at + channel] = Math.round(255 * levels[at * channels + Math.min(channel, channels - 1)]);
    }
    pixels.data[4 * at + 3] = 255;
  }
  Object.assign(picture, { width, height });
  picture.getContext("2d").putImageData(pixels, 0, 0);
}

class Stale extends Error {}

async function answer() {
  const mine = ++asked;
  if (!text.value.trim()) return say("Say what to draw.");
  const start = performance.now();
  const onStep = async (done) => {
    if (mine !== asked) throw new Stale();
    progress.value = done;
    say(`Step ${done} of ${bundle.steps} ...`);
    await new Promise((resume) => setTimeout(resume)); // the page is painted, and hears of what is typed
  };
  try {
    const found = await bundle.paint(bundle.ids(text.value), Number(seed.value) >>> 0, onStep);
    if (mine !== asked) return;
    show(found);
  } catch (error) {
    if (error instanceof Stale) return;
    say(`It could not be drawn: ${error.message}`, true);
    throw error;
  }
  picture.setAttribute("aria-label", text.value);
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const cut = bundle.fits(text.value) ? "" : " The prompt is too long; its end was not read.";
  say(`Drawn in ${bundle.steps} steps and ${seconds} s on this device; nothing was sent.${cut}`);
  if (!performance.getEntriesByName("first answer").length) performance.mark("first answer");
  document.body.dataset.answer = text.value;
}

/** Every case of the self-test; the largest difference of a level. Throws where that is too large. */
export async function tryAll() {
  await ready;
  return selftest(bundle);
}

async function start() {
  try {
    bundle = await openBundle(read);
  } catch (error) {
    say(`The model could not be opened: ${error.message}`, true);
    throw error;
  }
  document.body.dataset.ready = "yes";
  let waiting;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(answer, PAUSE_MS); // a picture is drawn of a whole prompt, not of each of its letters
  };
  text.addEventListener("input", soon);
  seed.addEventListener("input", soon);
  again.addEventListener("click", () => {
    seed.value = (Number(seed.value) + 1) >>> 0;
    return answer();
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
