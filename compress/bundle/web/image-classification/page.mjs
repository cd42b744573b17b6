// The page: a picture that is chosen, dropped, pasted or taken is answered here, on this device. Nothing is sent.
import { pictureOf } from "./picture.mjs";
import { ask, clear, say, start } from "./shown.mjs";

const [place, preview] = ["place", "preview"].map((id) => document.getElementById(id));
const MOST = 5;

await start(async (bundle) => {
  async function answer(blob) {
    clear();
    URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(blob);
    preview.alt = blob.name ?? "The picture";
    try {
      await ask(async () => bundle.classify(await pictureOf(blob)), MOST);
    } catch (error) {
      preview.removeAttribute("src");
      say(`This is no picture that the browser can show (${error.message}).`, true);
    }
  }

  const example = async (image) => answer(await (await fetch(image.src)).blob());
  for (const input of document.querySelectorAll("input[type=file]")) {
    input.addEventListener("change", () => input.files.length && answer(input.files[0]));
  }
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => example(button.firstElementChild));
  }
  const given = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      place.classList.toggle("over", kind === "dragover");
      const file = kind === "drop" && given(event.dataTransfer);
      if (file) answer(file);
      else if (kind === "drop") say("That was no picture.", true);
    });
  }
  addEventListener("paste", (event) => given(event.clipboardData) && answer(given(event.clipboardData)));
  await example(document.querySelector("button.example img"));
});
