// The page: which of some pictures is nearest to a given one is found here, on this device. Nothing is sent.
import { cosine } from "./answer.mjs";
import { pick } from "./picked.mjs";
import { pictureOf } from "./picture.mjs";
import { ask, start } from "./shown.mjs";

const MOST = 12;

await start(async (bundle) => {
  const known = []; // those to try, and what was given so far
  for (const image of document.querySelectorAll("button.example img")) {
    const embedding = await bundle.embed(await pictureOf(await (await fetch(image.src)).blob()));
    known.push({ label: image.alt, source: image.src, embedding });
  }

  await pick(async (picture, blob) => {
    await ask(async () => {
      const own = await bundle.embed(picture);
      const found = known.map(({ embedding, ...one }) => ({ ...one, score: cosine(own, embedding) }));
      if (blob.name) known.push({ label: blob.name, source: URL.createObjectURL(blob), embedding: own });
      return found.sort((a, b) => b.score - a.score);
    }, MOST, (score) => score.toFixed(3));
  });
});
