"""What may stand in the place of a mask: python examples/run.py "She opened the [MASK]." (--selftest: as tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Filler:
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

    def encode(self, text: str) -> list[int]:
        """The ids of a text: special ones before and after as many of its own as there is room for."""
        room = RULE["max_length"] - len(RULE["prefix_ids"]) - len(RULE["suffix_ids"])
        return [*RULE["prefix_ids"], *self.own_ids(text)[:room], *RULE["suffix_ids"]]

    def score(self, ids: list[int]) -> np.ndarray:
        """The score of each token of the vocabulary at the first mask."""
        if END["mask_id"] not in ids:
            sys.exit(f"there is no {END['mask']} in the text, or it is cut off")
        row = np.array([ids], dtype=np.int64)
        scores: np.ndarray = self.model.run({"input_ids": row, "attention_mask": np.ones_like(row)}, END["output"])
        own: np.ndarray = scores[ids.index(END["mask_id"])]
        return own

    def fill(self, text: str, most: int = 5) -> list[tuple[str, float]]:
        """(token, probability), likeliest first."""
        scores = self.score(self.encode(text))
        powers = np.exp(scores - scores.max())
        chosen = np.argsort(-powers)[:most].tolist()
        return [(self.tokenizer.decode([token]).strip(), float(powers[token] / powers.sum())) for token in chosen]


def selftest(filler: Filler) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        ids = filler.encode(case["text"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        found = filler.score(ids)[END["tested_ids"]]
        worst = max(worst, float(np.abs(found - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Filler()):.3g}\n")
    else:
        known = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))["cases"][0]
        for token, probability in Filler().fill(" ".join(sys.argv[1:]) or known["text"]):
            sys.stdout.write(f"{probability:7.2%}  {token}\n")
