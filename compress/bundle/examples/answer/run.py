"""The words of a text that answer a question: python examples/run.py "A question?" "A text." (--selftest: as tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys
import unicodedata

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Answerer:
    """The bundle's model."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(BUNDLE / RULE["tokenizer"]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.model = Model()

    def own_ids(self, text: str) -> list[int]:
        """A text's own ids, however many."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def room(self) -> int:
        """Tokens that both texts may have together."""
        return int(RULE["max_length"]) - sum(len(RULE[f"{name}_ids"]) for name in ("prefix", "middle", "suffix"))

    def assemble(self, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """Ids and token types of both texts' own ids, which are few enough."""
        head = [*RULE["prefix_ids"], *first, *RULE["middle_ids"]]
        tail = [*second, *RULE["suffix_ids"]]
        return head + tail, [0] * len(head) + [1] * len(tail)

    def encode(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """Ids and token types of two texts: the second is cut at its end."""
        first, second, room = self.own_ids(text), self.own_ids(pair), self.room
        return self.assemble(first, second[: max(room - len(first), 0)])

    def score(self, ids: list[int], types: list[int]) -> np.ndarray:
        """Of each token whether an answer begins there, and whether it ends there, [2, tokens]."""
        row = np.array([ids], dtype=np.int64)
        given = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.array([types])}
        first, last = (self.model.run(given, END[name]) for name in ("output", "end_output"))
        return np.stack([first, last])

    def find(self, question: str, context: str) -> str:
        """The words of the context, which is read in windows where it is long, without the marks around them."""
        asked, words = self.own_ids(question), context.split()
        ids: list[int] = []
        owners: list[int] = []
        for at, word in enumerate(words):
            own = self.own_ids(f" {word}" if at else word)
            ids += own
            owners += [at] * len(own)
        room = self.room - len(asked)
        if room < 6:
            sys.exit("the question leaves no room for a text")
        best = (-np.inf, 0, 0)
        for begin in range(0, max(len(ids), 1), room - room // 3):
            some = ids[begin : begin + room]
            shift = len(RULE["prefix_ids"]) + len(asked) + len(RULE["middle_ids"])
            first, last = self.score(*self.assemble(asked, some))[:, shift : shift + len(some)]
            for start in range(len(some)):
                end = start + int(last[start : start + END["max_tokens"]].argmax())
                best = max(best, (float(first[start] + last[end]), owners[begin + start], owners[begin + end]))
            if begin + room >= len(ids):
                break
        text = " ".join(words[best[1] : best[2] + 1])
        while text and unicodedata.category(text[0])[0] == "P":
            text = text[1:]
        while text and unicodedata.category(text[-1])[0] == "P":
            text = text[:-1]
        return text


def selftest(answerer: Answerer) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        ids, types = answerer.encode(case["text"], case["pair"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        worst = max(worst, float(np.abs(answerer.score(ids, types).ravel() - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Answerer()):.3g}\n")
    else:
        known = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))["cases"][0]
        asked, text = sys.argv[1:] if len(sys.argv) == 3 else (known["text"], known["pair"])
        sys.stdout.write(f"{Answerer().find(asked, text)}\n")
