// A picture that is chosen, dropped, pasted or taken, for the page of every model of pictures.
import { pictureOf } from "./picture.mjs";
import { clear, say } from "./shown.mjs";

const [place, preview, drawn] = ["place", "preview", "drawn"].map((id) => document.getElementById(id));

/** Shows each picture that is given, and the first of those to try, and calls `answer` with it and its file. */
export async function pick(answer) {
  async function show(blob) {
    clear();
    if (drawn) drawn.width = 1; // and nothing on it
    URL.revokeObjectURL(preview.src);
    preview.src = URL.createObjectURL(blob);
    preview.alt = blob.name ?? "The picture";
    let picture;
    try {
      picture = await pictureOf(blob);
    } catch (error) {
      preview.removeAttribute("src");
      say(`This is no picture that the browser can show (${error.message}).`, true);
      return;
    }
    await answer(picture, blob);
  }

  const example = async (image) => show(await (await fetch(image.src)).blob());
  for (const input of document.querySelectorAll("input[type=file]")) {
    input.addEventListener("change", () => input.files.length && show(input.files[0]));
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
      if (file) show(file);
      else if (kind === "drop") say("That was no picture.", true);
    });
  }
  addEventListener("paste", (event) => given(event.clipboardData) && show(given(event.clipboardData)));
  await example(document.querySelector("button.example img"));
}
