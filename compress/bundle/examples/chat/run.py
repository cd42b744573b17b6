"""Reply to a message as manifest.json says: python examples/run.py "Hello" (--selftest: as it was tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Chat:
    """The bundle's model. Each message stands alone."""

    def __init__(self) -> None:
        self.session = Model().session
        self.tokenizer = Tokenizer.from_file(str(BUNDLE / RULE["tokenizer"]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, message: str) -> list[int]:
        """The ids of a message's prompt."""
        text = RULE["before"] + message + RULE["after"]
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=RULE["add_special_tokens"]).ids
        if not 0 < len(ids) <= RULE["max_length"]:
            sys.exit(f"The prompt has {len(ids)} tokens; 1 to {RULE['max_length']} are taken.")
        return ids

    def logits(self, prompt: list[int], said: Sequence[int]) -> Iterator[np.ndarray]:
        """What may follow the prompt and each token of ``said``, which may grow meanwhile: [vocabulary] each time."""
        taken = {entry.name: entry for entry in self.session.get_inputs()}
        outputs = [END["output"], *END["cache"].values()]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past = {}
        for name in END["cache"]:
            _, heads, _, size = taken[name].shape
            past[name] = np.zeros((1, heads, 0, size), types[taken[name].type])
        ids, seen = prompt, 0
        while True:
            total = seen + len(ids)
            plain = {"input_ids": ids, "attention_mask": [1] * total, "position_ids": list(range(seen, total))}
            feed = {name: np.array([values], np.int64) for name, values in plain.items() if name in taken}
            found = dict(zip(outputs, self.session.run(outputs, {**feed, **past}), strict=True))
            past = {name: found[output] for name, output in END["cache"].items()}
            yield found[END["output"]][0, -1]
            # Without a cache all tokens are read again.
            whole = [*prompt, *said[: total - len(prompt) + 1]]
            seen = total if END["cache"] else 0
            ids = whole[seen:]

    def reply(self, message: str) -> Iterator[str]:
        """The text so far, at each token."""
        prompt, said = self.encode(message), list[int]()
        most = min(END["max_new_tokens"], END["max_length"] - len(prompt))
        for logits in self.logits(prompt, said):
            said.append(int(logits.argmax()))
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            ended = said[-1] in END["end_ids"] or len(said) == most
            # A character of several tokens isn't whole before the last of them.
            yield text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
            if ended:
                return


def selftest(chat: Chat) -> float:
    """Every case of selftest.json, each token of a reply read as it is expected; the largest difference of a logit.

    It is that of an expected token's height over the mean, or of how far it is behind the largest.
    """
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        prompt, known = chat.encode(case["text"]), case["reply"]
        if prompt != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {prompt}")
        places = zip(known["ids"], known["logits"], chat.logits(prompt, known["ids"]), strict=False)
        for token, height, logits in places:
            apart = abs(float(logits[token] - logits.mean(dtype=np.float64)) - height)
            worst = max(worst, apart, float(logits.max() - logits[token]))
    if not worst <= test["tolerance"]:
        sys.exit(f"replies differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; replies differ by at most {selftest(Chat()):.3g}\n")
    else:
        shown = ""
        for text in Chat().reply(" ".join(sys.argv[1:]) or "What is the capital of France?"):
            sys.stdout.write(text.removeprefix(shown))
            sys.stdout.flush()
            shown = text
        sys.stdout.write("\n")
