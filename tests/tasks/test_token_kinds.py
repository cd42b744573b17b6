"""Tests of Python token kinds: kinds by hand, and losses by kind that add up to the loss of the whole text."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from mergeable import train_tokenizer
from quantized import tiny_tokenizer

from compress.evaluation.evaluate import token_kind_rows
from compress.results.report import Measurement
from compress.tasks.evaluation import Evaluation
from compress.tasks.text_generation import KINDS, TASK, python_kinds
from compress.tasks.token_sequences import token_ids
from compress.utils.errors import DataError

CODE = 'def f(x):\n    if x > 12: # é\n        s = f"a{x}"\n'
BY_HAND = "kkk_ioioo_" + "____kk_i_o_nno_ccc_" + "________i_o_sssssss_"
LETTERS = {"_": "whitespace", "i": "identifier", "k": "keyword", "s": "string", "n": "number", "c": "comment",
           "o": "operator"}  # fmt: skip


def test_kind_of_each_byte_matches_kinds_by_hand() -> None:
    kinds = [KINDS[kind] for kind in python_kinds([CODE, "x"])]
    # The letter é has two bytes; a blank line stands between two texts.
    expected = [LETTERS[letter] for letter in BY_HAND]
    offset = CODE.index("é")
    assert kinds == [*expected[:offset], "comment", *expected[offset:], "whitespace", "whitespace", "identifier"]


def test_invalid_python_is_rejected() -> None:
    with pytest.raises(DataError, match="not valid Python"):
        python_kinds(["x = 1", "def f(:\n  '''"])


def test_token_has_kind_of_its_first_nonspace_byte() -> None:
    """Tokens of this tokenizer have one letter per byte, so that their lengths give their offsets in the text."""
    texts = [CODE, "def cat(x):\n    return x + 1  # the mat"] * 4
    rows, tokenizer = pa.table({"text": texts}), train_tokenizer()
    examples = TASK.eval_examples(rows, tokenizer, None, 12, Evaluation(stride=5))
    categories = TASK.token_categories(rows, tokenizer, examples, "python")
    text = "\n\n".join(texts).encode()
    kinds, ids = python_kinds(texts), token_ids(rows, tokenizer)
    places = np.cumsum([0, *map(len, tokenizer.convert_ids_to_tokens(ids))])
    expected = []
    for begin, end in itertools.pairwise(places):
        own_bytes = [byte for byte in range(begin, end) if text[byte : byte + 1] != b" "]
        expected.append(KINDS[kinds[own_bytes[0]]] if own_bytes else "whitespace")
    for row in range(len(examples)):
        for column in range(5):
            (kind,) = (name for name, chosen in categories.items() if chosen[row, column])
            assert kind == expected[5 * row + 12 - 5 + column]
    assert TASK.token_categories(rows, tokenizer, examples, "text") == {}


def test_losses_by_kind_add_up_to_total_loss() -> None:
    rows = pa.table({"text": [CODE] * 20})
    examples = TASK.eval_examples(rows, tiny_tokenizer(), None, 16, Evaluation())
    kinds = TASK.token_categories(rows, tiny_tokenizer(), examples, "python")
    losses = np.random.default_rng(0).exponential(2, (len(examples), 15))
    counts = {kind: chosen.sum(axis=1) for kind, chosen in kinds.items()}
    whole = Measurement(model="final", metric="perplexity_on_code", target="cpu", value=1.0, unit="", n=1)
    rows_by_kind = {row.metric[19:-1]: row for row in token_kind_rows(losses, kinds, counts, whole)}
    assert set(rows_by_kind) == set(KINDS)
    assert sum(counts[kind].sum() for kind in KINDS) == losses.size
    assert sum(counts[kind].sum() * math.log(row.value) for kind, row in rows_by_kind.items()) == pytest.approx(
        losses.sum()
    )
    for kind, row in rows_by_kind.items():
        assert np.exp(losses[kinds[kind]].mean()) == pytest.approx(row.value) == pytest.approx(np.exp(np.mean(row.raw)))
        assert row.low is not None and row.high is not None and row.low < row.value < row.high
