// The same in Node: one order a line on standard input, one answer a line on standard output.
import { createInterface } from "node:readline";
import * as session from "./session.mjs";

const tell = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr); // what libraries print is no answer
for await (const line of createInterface({ input: process.stdin })) {
  const { name, given } = JSON.parse(line);
  try {
    tell(JSON.stringify({ found: (await session[name](given)) ?? null }) + "\n");
  } catch (error) {
    tell(JSON.stringify({ failed: String(error?.message ?? error) }) + "\n");
  }
}
process.exit(0);
