"""Answer a sentence as manifest.json says: python examples/run.py "A lovely film." (--selftest: as it was tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Classifier:
    """The bundle's model."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(BUNDLE / RULE["tokenizer"]))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.model = Model()

    def encode(self, text: str) -> list[int]:
        """The ids of a text: special ones before and after as many of its own as there is room for."""
        own = self.tokenizer.encode(text, add_special_tokens=False).ids
        room = RULE["max_length"] - len(RULE["prefix_ids"]) - len(RULE["suffix_ids"])
        return [*RULE["prefix_ids"], *own[:room], *RULE["suffix_ids"]]

    def score(self, ids: list[int]) -> np.ndarray:
        """The model's scores for ids, one a label."""
        row = np.array([ids], dtype=np.int64)
        scores: np.ndarray = self.model.run({"input_ids": row, "attention_mask": np.ones_like(row)}, END["output"])
        return scores

    def classify(self, text: str) -> list[tuple[str, float]]:
        """(label, probability), likeliest first."""
        scores = self.score(self.encode(text))
        powers = np.exp(scores - scores.max())
        answers = zip(END["labels"], (powers / powers.sum()).tolist(), strict=True)
        return sorted(answers, key=lambda answer: -answer[1])


def selftest(classifier: Classifier) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        ids = classifier.encode(case["text"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        worst = max(worst, float(np.abs(classifier.score(ids) - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Classifier()):.3g}\n")
    else:
        text = " ".join(sys.argv[1:]) or "A lovely film."
        for label, probability in Classifier().classify(text):
            sys.stdout.write(f"{probability:7.2%}  {label}\n")
