// The page: what is in a picture is found here, on this device, and drawn over it. Nothing is sent.
import { pick } from "./picked.mjs";
import { ask, start } from "./shown.mjs";

const [drawn, least, sure] = ["drawn", "least", "sure"].map((id) => document.getElementById(id));
const [MOST, SHARP, TURN] = [12, 1200, 137.5]; // degrees of hue from one label to the next

await start(async (bundle) => {
  const { labels } = bundle.manifest.postprocessing;
  let picture;

  function draw(boxes) {
    const side = Math.max(picture.width, picture.height);
    const [scale, unit] = [SHARP / side, side / 320];
    [drawn.width, drawn.height] = [picture.width * scale, picture.height * scale];
    const context = drawn.getContext("2d");
    context.scale(scale, scale);
    context.lineWidth = 2 * unit;
    context.font = `600 ${12 * unit}px system-ui, sans-serif`;
    for (const { label, box } of boxes.toReversed()) {
      const [left, top, width, height] = box;
      context.strokeStyle = context.fillStyle = `hsl(${(labels.indexOf(label) * TURN) % 360} 80% 45%)`;
      context.strokeRect(left, top, width, height);
      const wide = context.measureText(label).width + 6 * unit;
      const above = Math.max(top - 16 * unit, 0);
      context.fillRect(left, above, wide, 16 * unit);
      context.fillStyle = "#fff";
      context.fillText(label, left + 3 * unit, above + 12 * unit);
    }
  }

  async function answer() {
    sure.textContent = `${Math.round(100 * least.value)}%`;
    let boxes = [];
    await ask(async () => (boxes = await bundle.detect(picture, Number(least.value))), MOST);
    draw(boxes);
  }

  least.addEventListener("input", answer);
  await pick((given) => {
    picture = given;
    return answer();
  });
});
