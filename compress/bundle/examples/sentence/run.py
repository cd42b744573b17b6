"""Find the nearest of some sentences: python examples/run.py "A question?" "One." "Another." (--selftest: as tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys
from typing import Any

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]
SHORT, FEW = 120, 7


class Encoder:
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

    def embed(self, text: str) -> np.ndarray:
        """Its embedding, [dimensions]."""
        return self.embed_ids(self.encode(text))

    def embed_ids(self, ids: list[int]) -> np.ndarray:
        """The embedding of a text with these ids."""
        row = np.array([ids], dtype=np.int64)
        found: np.ndarray = self.model.run({"input_ids": row, "attention_mask": np.ones_like(row)}, END["output"])
        if END["pooling"] == "mean":
            found = found.mean(axis=0)
        elif END["pooling"] == "max":
            found = found.max(axis=0)
        elif END["pooling"] is not None:
            found = found[0 if END["pooling"] == "cls" else -1]
        return found / np.linalg.norm(found) if END["normalize"] else found

    def nearest(self, question: str, sentences: list[str]) -> list[tuple[str, float]]:
        """(sentence, cosine), the nearest first."""
        asked = self.embed(question)
        found = [(sentence, cosine(asked, self.embed(sentence))) for sentence in sentences]
        return sorted(found, key=lambda pair: -pair[1])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two vectors."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def selftest(encoder: Encoder, test: dict[str, Any]) -> float:
    """Every case of selftest.json; the largest difference of a value."""
    worst = 0.0
    for case in test["cases"]:
        ids = encoder.encode(case["text"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        found, known = encoder.embed_ids(ids), np.array(case["embedding"])
        if not cosine(found, known) >= test["cosine"]:
            sys.exit(f"the cosine of {case['text'][:40]!r} is {cosine(found, known):.6f}; {test['cosine']} is asked")
        worst = max(worst, float(np.abs(found - known).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"values differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    tested = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; values differ by at most {selftest(Encoder(), tested):.3g}\n")
    else:
        short = [case["text"] for case in tested["cases"] if 0 < len(case["text"]) <= SHORT][:FEW]
        asked, *sentences = sys.argv[1:] if len(sys.argv) > 2 else short
        for sentence, score in Encoder().nearest(asked, sentences):
            sys.stdout.write(f"{score:6.3f}  {sentence}\n")
