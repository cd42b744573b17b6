// Prepared values by a page's own code: node pixels.mjs PREPARE.mjs FOLDER, which has cases.json and N.rgba, and gets N.f32
import { readFile, writeFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
const [module, folder] = process.argv.slice(2);
const { openPreparation } = await import(pathToFileURL(module));
for (const [number, { width, height, rule }] of JSON.parse(await readFile(`${folder}/cases.json`)).entries()) {
  const { prepare } = await openPreparation({ preprocessing: rule });
  const { data } = prepare({ width, height, data: await readFile(`${folder}/${number}.rgba`) });
  await writeFile(`${folder}/${number}.f32`, data);
}
