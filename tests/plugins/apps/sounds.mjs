// What a model hears by a page's own code: node sounds.mjs PREPARE.mjs FOLDER, which has cases.json and N.wave (float32), and
// gets N.f32
import { readFile, writeFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
const [module, folder] = process.argv.slice(2);
const { openPreparation } = await import(pathToFileURL(module));
for (const [number, rule] of JSON.parse(await readFile(`${folder}/cases.json`)).entries()) {
  const { prepare } = await openPreparation({ preprocessing: rule });
  const bytes = await readFile(`${folder}/${number}.wave`);
  const { data } = prepare(new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4));
  await writeFile(`${folder}/${number}.f32`, data);
}
