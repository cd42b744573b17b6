// Transcripts by transformers.js, from the files of this bundle alone; the page imports it, and so may yours.
import { pipeline } from "./runtime/transformers.min.js";
import { json, typesOf } from "./local.mjs";

export { samplesOf } from "./recording.mjs";

/** {manifest, json, transcribe}. */
export async function openBundle() {
  const manifest = await json("manifest.json");
  const dtype = typesOf(manifest);
  const listen = await pipeline("automatic-speech-recognition", "model", { dtype, device: "wasm" });

  /** What is said in samples between -1 and 1, a Float32Array of one channel at the rate of the manifest. */
  async function transcribe(samples) {
    const seconds = manifest.preprocessing.chunk_seconds;
    const long = samples.length > seconds * manifest.preprocessing.sampling_rate;
    const { text } = await listen(samples, long ? { chunk_length_s: seconds, stride_length_s: seconds / 6 } : {});
    return text.trim();
  }

  return { manifest, json, transcribe };
}
