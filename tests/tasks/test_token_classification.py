"""Tests of token classification: labels compared with transformers' pipeline, entity F1 with seqeval."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from seqeval.metrics import f1_score
from tiny import byte_level, unigram, word_piece
from tiny_tasks import rows, write_model
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from compress.data.columns import choose
from compress.data.files import Rows
from compress.numerics.statistics import linearized, ratio_interval
from compress.tasks.inference import predict
from compress.tasks.spans import check_schemes, scheme_of
from compress.tasks.token_classification import TASK, first_tokens
from compress.utils.errors import DataError

NAMES = ("B-BAD", "B-GOOD", "I-BAD", "I-GOOD", "O")


def table(some: list[dict[str, list[str]]]) -> pa.Table:
    rows = Rows("here", ("tokens", "tags"), {name: [row[name] for row in some] for name in ("tokens", "tags")})
    return choose(rows, TASK.columns, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = tmp_path_factory.mktemp("tags")
    write_model(model_folder, TASK.name, id2label=dict(enumerate(NAMES)))
    return model_folder


def test_labels_equal_transformers_pipeline(folder: Path) -> None:
    model = TASK.load(folder, NAMES, trust_remote_code=False)
    some = dict(rows(TASK.name))["train"]
    examples = TASK.encode(table(some), model.processor, NAMES, 32)
    collected = TASK.collect({"logits": predict(model.module, examples)}, examples, range(len(some)))
    tagger = pipeline(
        "token-classification",
        model=AutoModelForTokenClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        aggregation_strategy="none",
        ignore_labels=[],
    )
    for row, entities in zip(some, collected["found"].tolist(), strict=True):
        text = " ".join(row["tokens"])
        starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"])])[:-1]
        firsts = {token["start"]: token["entity"] for token in tagger(text)}
        assert entities.split(" ") == [firsts[start] for start in starts]


@pytest.mark.parametrize("tokenizer", [word_piece, byte_level, unigram])
def test_first_token_of_each_word_matches_transformers(tokenizer) -> None:
    word_tokenizer = tokenizer()
    for words in (["lovely", "film", "zebra"], ["quartz"], ["a", "boring", "plot", "3.14", "noisy!"]):
        text = " ".join(words)
        encoded = word_tokenizer(text, return_offsets_mapping=True)
        starts = first_tokens(text, encoded["offset_mapping"])
        pieces = [word_tokenizer.convert_ids_to_tokens(encoded["input_ids"])[start] for start in starts]
        alone = [word_tokenizer.tokenize(word if at == 0 else f" {word}")[0] for at, word in enumerate(words)]
        # A SentencePiece tokenizer puts its space symbol before every word, also at the start of a text.
        assert pieces == alone


def test_truncated_word_counts_as_missed() -> None:
    long = table([{"tokens": ["film"] * 8 + ["great"], "tags": ["O"] * 8 + ["B-GOOD"]}])
    examples = TASK.encode(long, word_piece(), NAMES, 6)
    assert len(examples.inputs[0]["input_ids"]) == 6 and "5 words have no token" in examples.note
    logits = np.zeros((1, 6, len(NAMES)), np.float32)
    collected = TASK.collect({"logits": logits}, examples, [0])
    assert collected["wanted"][0] == "O O O O O O O O B-GOOD"
    assert collected["found"][0] == "B-BAD B-BAD B-BAD B-BAD O O O O O"


def test_padding_does_not_count() -> None:
    examples = TASK.encode(table([{"tokens": ["film"] * n, "tags": ["O"] * n} for n in (1, 4)]), word_piece(), NAMES, 8)
    batch = examples.batch([0, 1])
    answers = examples.answers({"logits": np.ones((2, 6, 5), np.float32)}, batch)
    assert answers[0, 3:].sum() == 0 and answers[0, :3].all() and answers[1].all()
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    outputs = type("Out", (), {"logits": torch.randn(2, 6, 5)})
    labels = torch.from_numpy(examples.labels)
    flat = torch.nn.functional.cross_entropy(outputs.logits[[0, 1, 1, 1, 1], [1, 1, 2, 3, 4]], torch.full((5,), 4))
    torch.testing.assert_close(TASK.loss(outputs, labels), flat)


def test_f1_equals_seqeval() -> None:
    chance = random.Random(3)

    def labels() -> list[str]:
        drawn_labels: list[str] = []
        while len(drawn_labels) < 12:
            kind, length = chance.choice("XY"), chance.randrange(1, 4)
            drawn_labels += ["O"] * chance.randrange(3) + [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
        return drawn_labels[:12]

    expected_tags = [labels() for _ in range(50)]
    predicted_tags = [[label if chance.random() < 0.8 else "O" for label in row] for row in expected_tags]
    collected = {
        name: np.array([" ".join(row) for row in side])
        for name, side in (("found", predicted_tags), ("wanted", expected_tags))
    }
    measured = {row.metric: row for row in TASK.measure(collected, None, "m", "t")}
    expected = f1_score(expected_tags, predicted_tags)
    assert measured["f1"].value == pytest.approx(expected)
    whole = [row == other for row, other in zip(expected_tags, predicted_tags, strict=True)]
    assert measured["exact_match"].value == np.mean(whole)
    assert np.mean(measured["f1"].raw) == pytest.approx(expected)
    assert measured["f1"].low < expected < measured["f1"].high
    assert set(measured) >= {"f1_X", "f1_Y", "precision", "recall", "token_accuracy"}


def test_entities_in_bilou_scheme_are_counted() -> None:
    tags = np.array(["O B-X I-X L-X U-Y", "U-X O O O O"])
    rows = {row.metric: row.value for row in TASK.measure({"found": tags, "wanted": tags}, None, "m", "t")}
    assert (rows["f1"], rows["f1_X"], rows["f1_Y"]) == (1.0, 1.0, 1.0)


def test_linearized_ratio_has_correct_mean_and_deviation() -> None:
    generator = np.random.default_rng(0)
    wholes = generator.integers(0, 6, 400)
    parts = generator.binomial(wholes, 0.7)
    values = linearized(parts, wholes)
    assert values.mean() == pytest.approx(parts.sum() / wholes.sum())
    drawn = generator.integers(0, 400, (4000, 400))
    spread = (parts[drawn].sum(1) / wholes[drawn].sum(1)).std()
    assert values.std() / 20 == pytest.approx(spread, rel=0.05)
    interval = ratio_interval(parts, wholes, 0)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-X", "I-X"], "BIO"),
        (["O", "I-X"], "IO"),
        (["O", "B-X", "I-X", "L-X", "U-X"], "BILOU"),
        (["O", "B-X", "I-X", "E-X", "S-X"], "BIOES"),
        (["NOUN", "VERB", "X-Y"], None),
    ],
)
def test_scheme_is_inferred_from_labels(labels: list[str], scheme: str | None) -> None:
    assert scheme_of(labels) == scheme


@pytest.mark.parametrize(
    ("labels", "says"), [(["B-X", "L-X", "E-X"], "prefixes B, E, L"), (["O", "B-X", "NOUN"], "'NOUN' marks no entity")]
)
def test_labels_of_mixed_schemes_are_rejected(labels: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        scheme_of(labels)


def test_labels_in_another_scheme_than_the_model_are_reported(folder: Path) -> None:
    with pytest.raises(DataError, match=r"labels are BILOU, as 'U-GOOD' shows; the model's are BIO"):
        TASK.load(folder, ("O", "B-GOOD", "U-GOOD", "L-GOOD"), trust_remote_code=False)
    check_schemes(NAMES, ("O", "B-GOOD"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": [], "tags": []}, "sentence is empty"),
        ({"tokens": ["a b"], "tags": ["O"]}, "white space in it"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 labels"),
        ({"tokens": [3], "tags": ["O"]}, "value of type list"),
        ({"tokens": ["a"], "tags": [None]}, "value of type list"),
    ],
)
def test_invalid_rows_are_reported(row: dict, says: str) -> None:
    with pytest.raises(DataError, match=says):
        TASK.encode(table([row]), word_piece(), NAMES, 8)
