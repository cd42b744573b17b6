// The page: what is heard in a recording that is chosen, dropped or spoken is told here, on this device. Nothing is sent.
import { listen, samplesOf } from "./recording.mjs";
import { ask, clear, say, start } from "./shown.mjs";

const MOST = 5;

await start(async (bundle) => {
  async function answer(blob) {
    clear();
    let samples;
    try {
      samples = await samplesOf(blob, bundle.manifest.preprocessing);
    } catch (error) {
      say(`This is no recording that the browser can play (${error.message}).`, true);
      return;
    }
    await ask(() => bundle.classify(samples), MOST);
  }

  listen(answer, say);
  say("Ready.");
});
