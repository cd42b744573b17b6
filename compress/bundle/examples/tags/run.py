"""Mark the words of a sentence: python examples/run.py "Ada Lovelace in London." (--selftest: as it was tested)

Needs: pip install tokenizers numpy, and what model.py names
"""

import json
import sys

import numpy as np
from tokenizers import Tokenizer

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]


class Tagger:
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
        """The model's scores for ids, [tokens, labels]."""
        row = np.array([ids], dtype=np.int64)
        scores: np.ndarray = self.model.run({"input_ids": row, "attention_mask": np.ones_like(row)}, END["output"])
        return scores.reshape(-1, len(END["labels"]))

    def tag(self, text: str) -> list[tuple[str, str]]:
        """(word, label) of a text's words; those that are cut off are missing."""
        words = text.split()
        if not words:
            return []
        scores = self.score(self.encode(" ".join(words)))
        found, place = [], len(RULE["prefix_ids"])
        for at, word in enumerate(words):
            tokens = len(self.own_ids(f" {word}" if at else word))
            if place >= len(scores) - len(RULE["suffix_ids"]):
                break
            found.append((word, END["labels"][int(scores[place].argmax())] if tokens else "O"))
            place += tokens
        return found

    def entities(self, text: str) -> list[tuple[str, str]]:
        """(text, kind) of each entity."""
        found: list[tuple[list[str], str]] = []
        ended = True
        for word, label in self.tag(text):
            mark, dash, kind = label.partition("-")
            mark, kind = ("O", "") if label == "O" else (mark, kind) if dash else ("U", label)
            if found and found[-1][1] == kind and not ended and mark not in "BUS":
                found[-1][0].append(word)
            else:
                found.append(([word], kind))
            ended = mark in "ELUS"
        return [(" ".join(words), kind) for words, kind in found if kind]


def selftest(tagger: Tagger) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        ids = tagger.encode(case["text"])
        if ids != case["input_ids"]:
            sys.exit(f"other ids of {case['text'][:40]!r}: {ids}")
        worst = max(worst, float(np.abs(tagger.score(ids).ravel() - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Tagger()):.3g}\n")
    else:
        for entity, kind in Tagger().entities(" ".join(sys.argv[1:]) or "Ada Lovelace in London."):
            sys.stdout.write(f"{kind:12}  {entity}\n")
