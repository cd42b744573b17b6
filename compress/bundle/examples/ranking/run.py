"""Put texts in order for a query: python examples/run.py "A query?" "One." "Another." (--selftest: as tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Ranker:
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
        """Ids and token types of two texts: the longer one is cut until both are alike."""
        first, second, room = self.own_ids(text), self.own_ids(pair), self.room
        if len(first) + len(second) > room:
            short = min(len(first), len(second))
            one = short if 2 * short <= room else room // 2
            left, right = (one, room - one) if len(first) <= len(second) else (room - one, one)
            first, second = first[:left], second[:right]
        return self.assemble(first, second)

    def score(self, ids: list[int], types: list[int]) -> np.ndarray:
        """The model's logits for a pair: one, or two."""
        row = np.array([ids], dtype=np.int64)
        given = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.array([types])}
        logits: np.ndarray = self.model.run(given, END["output"])
        return logits

    def relevance(self, text: str, pair: str) -> float:
        """From 0 to 1."""
        logits = self.score(*self.encode(text, pair))
        return float(1 / (1 + np.exp(-(logits[1] - logits[0] if len(logits) > 1 else logits[0]))))

    def rank(self, query: str, texts: list[str]) -> list[tuple[str, float]]:
        """(text, relevance), the most relevant first."""
        return sorted(((text, self.relevance(query, text)) for text in texts), key=lambda found: -found[1])


def selftest(ranker: Ranker) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        ids, types = ranker.encode(case["text"], case["pair"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        worst = max(worst, float(np.abs(ranker.score(ids, types).ravel() - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Ranker()):.3g}\n")
    else:
        known = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))["cases"]
        own = [known[0]["text"], *(case["pair"] for case in known if case["text"] == known[0]["text"])]
        asked, *found = sys.argv[1:] if len(sys.argv) > 2 else own
        for text, score in Ranker().rank(asked, found):
            sys.stdout.write(f"{score:6.3f}  {text}\n")
