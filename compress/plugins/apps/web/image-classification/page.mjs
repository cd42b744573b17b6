// The page: a picture that is chosen, dropped, pasted or taken is answered here, on this device. Nothing is sent.
import { pick } from "./picked.mjs";
import { ask, start } from "./shown.mjs";

const MOST = 5;

await start((bundle) => pick((picture) => ask(() => bundle.classify(picture), MOST)));
