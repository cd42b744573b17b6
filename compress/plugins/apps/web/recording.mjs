// A recording that is chosen, dropped or spoken, for the page of every model of sound.
/** The samples of an encoded recording, a blob or file, at the model's rate. */
export async function samplesOf(blob, { sampling_rate: rate }) {
  const context = new OfflineAudioContext(1, 1, rate);
  const heard = await context.decodeAudioData(await blob.arrayBuffer());
  const mixed = new Float32Array(heard.length);
  for (let channel = 0; channel < heard.numberOfChannels; channel++) {
    heard.getChannelData(channel).forEach((value, at) => (mixed[at] += value / heard.numberOfChannels));
  }
  return mixed;
}

const file = async (path) => (await fetch(path)).blob();

/** Calls `answer` with each recording that is given, as a blob, and `say` with a word where there is no microphone. */
export function listen(answer, say) {
  const [place, record] = ["place", "record"].map((id) => document.getElementById(id));

  async function speak() {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const recorder = new MediaRecorder(stream);
    const parts = [];
    recorder.addEventListener("dataavailable", ({ data }) => parts.push(data));
    recorder.addEventListener("stop", () => {
      stream.getTracks().forEach((track) => track.stop());
      record.textContent = "Record";
      answer(new Blob(parts));
    });
    recorder.start();
    record.textContent = "Stop";
    record.addEventListener("click", () => recorder.stop(), { once: true });
  }

  document.querySelector("input[type=file]").addEventListener("change", ({ target }) => target.files.length && answer(target.files[0]));
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", async () => answer(await file(button.dataset.file)));
  }
  record.addEventListener("click", () => record.textContent === "Record" && speak().catch((error) => say(`No microphone: ${error.message}`, true)));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      place.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) answer(event.dataTransfer.files[0]);
    });
  }
}
