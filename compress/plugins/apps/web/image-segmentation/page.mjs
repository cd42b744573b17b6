// The page: the class of each pixel of a picture is found here, on this device, and laid over it. Nothing is sent.
import { pick } from "./picked.mjs";
import { ask, start } from "./shown.mjs";

const drawn = document.getElementById("drawn");
const [LARGEST, MOST, OPAQUE, TURN] = [512, 12, 150, 137.5]; // degrees of hue from one label to the next

await start(async (bundle) => {
  const { labels } = bundle.manifest.postprocessing;
  const colours = labels.map((_, index) => rgb(`hsl(${(index * TURN) % 360} 75% 50%)`));

  await pick(async (picture) => {
    const scale = Math.min(1, LARGEST / Math.max(picture.width, picture.height));
    const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
    let ids;
    await ask(async () => {
      ids = await bundle.segment(picture, width, height);
      const counts = labels.map(() => 0);
      for (const id of ids) counts[id]++;
      const found = labels.map((label, index) => ({ label, score: counts[index] / ids.length, colour: colours[index] }));
      return found.filter(({ score }) => score > 0).sort((a, b) => b.score - a.score);
    }, MOST);
    const overlay = new ImageData(width, height);
    ids.forEach((id, at) => overlay.data.set([...colours[id], OPAQUE], 4 * at));
    [drawn.width, drawn.height] = [width, height];
    drawn.getContext("2d").putImageData(overlay, 0, 0);
  });
});

/** [red, green, blue] of a colour of CSS. */
function rgb(colour) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}
