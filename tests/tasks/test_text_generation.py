"""Tests of text generation metrics: compared with transformers' loss, torch's KL divergence and values by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from decoder_graphs import TinyDecoder
from mergeable import TEXTS, save_mergeable_llama
from quantized import save_tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.evaluation.evaluate import predict
from compress.formats.targets import TARGETS
from compress.models.model import TorchModel
from compress.models.vocabulary import trim
from compress.results.report import Measurement
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import CollectedOutputs, Examples
from compress.tasks.text_generation import TASK
from compress.tasks.token_sequences import prefix_tokens, spread, token_ids
from compress.utils.errors import DataError, ModelError
from compress.utils.progress import SilentProgress

LENGTH = 16


def rows(*texts: str) -> pa.Table:
    return pa.table({"text": list(texts)})


def prose(words: int, seed: int = 0) -> str:
    chance = np.random.default_rng(seed)
    return " ".join("".join(chance.choice(list("abcdefgh"), 4)) for _ in range(words))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return two models with a common vocabulary and different weights."""
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_tiny_llama(folder, seed=seed)
    return [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]


@torch.inference_mode()
def logits(model: Any, examples: Examples, index: int) -> torch.Tensor:
    ids = torch.from_numpy(examples.inputs[index]["input_ids"])
    answer: torch.Tensor = model(ids[None]).logits
    return answer


def collected_outputs(model: Any, examples: Examples) -> CollectedOutputs:
    """Return the outputs that the task collects, computed window by window."""
    parts = [TASK.collect({"logits": logits(model, examples, i).numpy()}, examples, [i]) for i in range(len(examples))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def held_out(text: str, **evaluation: Any) -> Examples:
    return TASK.eval_examples(rows(text), tiny_tokenizer(), None, LENGTH, Evaluation(**evaluation))


def by_metric(measured: list[Measurement]) -> dict[str, Measurement]:
    return {row.metric: row for row in measured}


def test_perplexity_equals_transformers_loss(models: list[Any]) -> None:
    examples = held_out(prose(20))
    measured = by_metric(TASK.measure(collected_outputs(models[0], examples), None, "final", "cpu"))
    losses, right = [], []
    for index, example in enumerate(examples.inputs):
        ids = torch.from_numpy(example["input_ids"])[None]
        with torch.inference_mode():
            losses.append(float(models[0](ids, labels=ids).loss))
        right.append(float((logits(models[0], examples, index)[0, :-1].argmax(-1) == ids[0, 1:]).float().mean()))
    assert len(losses) == 6  # 20 words of 4 letters and 19 spaces: 99 tokens
    perplexity = measured["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert perplexity.raw == pytest.approx(losses, rel=1e-5)
    assert perplexity.low is not None and perplexity.high is not None
    assert perplexity.low < perplexity.value < perplexity.high
    assert measured["next_token_accuracy"].value == pytest.approx(np.mean(right))


def test_stride_scores_only_new_tokens_of_each_window(models: list[Any]) -> None:
    """Expected values follow transformers' guide to perplexity: labels of tokens that were already scored are -100."""
    examples = held_out(prose(20), stride=6)
    perplexity = by_metric(TASK.measure(collected_outputs(models[0], examples), None, "final", "cpu"))["perplexity"]
    ids, losses = token_ids(rows(prose(20)), tiny_tokenizer()), []
    for start in range(0, len(ids) - LENGTH + 1, 6):
        window = torch.from_numpy(ids[start : start + LENGTH])[None]
        labels = window.clone()
        labels[:, :-6] = -100
        with torch.inference_mode():
            losses.append(float(models[0](window, labels=labels).loss))
    assert perplexity.n == len(losses) == 14
    assert perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_kl_divergence_equals_torch(models: list[Any]) -> None:
    examples = held_out(prose(20))
    mine = by_metric(
        TASK.compare(collected_outputs(models[1], examples), collected_outputs(models[0], examples), "final", "cpu")
    )
    expected, same = [], []
    for index in range(len(examples)):
        original, other = (logits(model, examples, index)[0, :-1] for model in models)
        divergences = torch.nn.functional.kl_div(
            other.log_softmax(-1), original.log_softmax(-1), reduction="none", log_target=True
        )
        expected.append(float(divergences.sum(-1).mean()))
        same.append(float((original.argmax(-1) == other.argmax(-1)).float().mean()))
    # The only difference is rounding to float16: all 15 positions of each of 6 windows are kept.
    assert mine["kl_divergence"].raw == pytest.approx(expected, rel=2e-3)
    assert mine["agreement"].raw == pytest.approx(same)
    assert 0 < np.mean(same) < 1


def test_many_windows_keep_few_distributions_each(models: list[Any]) -> None:
    examples = held_out(prose(1100))  # 343 windows: one position each
    places = [TASK.collect({"logits": logits(models[0], examples, i).numpy()}, examples, [i]) for i in (0, 1, 2, 3)]
    assert {part["log_probabilities"].shape for part in places} == {(1, 1, 160)}
    whole = [logits(models[0], examples, i)[0, :-1].log_softmax(-1).numpy() for i in range(4)]
    collected = [
        int(np.abs(all_ - part["log_probabilities"][0]).sum(-1).argmin())
        for all_, part in zip(whole, places, strict=True)
    ]
    assert len(set(collected)) > 1, "positions differ between windows"


def test_training_loss_equals_transformers(models: list[Any]) -> None:
    ids = torch.from_numpy(np.stack([example["input_ids"] for example in held_out(prose(20)).inputs]))
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.inference_mode():
        outputs = models[0](ids, labels=labels)
    assert float(TASK.loss(outputs, labels)) == pytest.approx(float(outputs.loss), rel=1e-6)


def test_windows_are_consecutive_and_remainder_is_reported() -> None:
    examples = TASK.eval_examples(rows("abcdefgh", "ijklm"), tiny_tokenizer(), None, 4, Evaluation())
    text = "".join(tiny_tokenizer().convert_ids_to_tokens(np.concatenate([e["input_ids"] for e in examples.inputs])))
    # Rows are separated by a blank line, which is unknown to this tokenizer; "klm" is shorter than a window.
    assert text == "abcdefgh<unk><unk>ij"
    assert examples.note.startswith("evaluated on 3 windows of 4 tokens (15 tokens of test text; the last 3 ")


def test_text_shorter_than_a_window_gives_no_examples() -> None:
    assert len(TASK.encode(rows("abc"), tiny_tokenizer(), None, 4)) == 0
    assert len(TASK.encode(rows("abcd"), tiny_tokenizer(), None, 4)) == 1


def test_every_window_begins_with_prefix_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert prefix_tokens(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert prefix_tokens(tokenizer) == [1]
    examples = TASK.encode(rows("abcdef"), tokenizer, None, 4)
    window_tokens = [tokenizer.convert_ids_to_tokens(example["input_ids"].tolist()) for example in examples.inputs]
    assert window_tokens == [["<s>", "a", "b", "c"], ["<s>", "d", "e", "f"]]


@pytest.mark.parametrize(
    ("count", "limit", "expected"), [(5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (9, 1, [4]), (1, 1, [0])]
)
def test_spread(count: int, limit: int, expected: list[int]) -> None:
    assert spread(count, limit) == expected


def test_limited_windows_are_spread_over_the_text() -> None:
    every, some = held_out(prose(20)), held_out(prose(20), windows=3)
    chosen = [next(i for i, e in enumerate(every.inputs) if np.array_equal(e["input_ids"], s["input_ids"]))
              for s in some.inputs]  # fmt: skip
    assert chosen == [0, 2, 5]
    assert some.note.startswith("evaluated on 3 of 6 windows of 16 tokens")


def test_graph_with_cache_evaluates_whole_windows(tmp_path: Path) -> None:
    decoder = TinyDecoder()
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary, (3, 12))
    windows = [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids]
    examples = Examples(windows, {"input_ids": 0, "attention_mask": 0})
    predictions = predict(decoder.write(tmp_path), TASK, examples, TARGETS["cpu"], 1, SilentProgress(), "")
    for row, loss in zip(ids, predictions.kept["loss"], strict=True):
        chances = torch.from_numpy(decoder.logits(row)[:-1]).log_softmax(-1).numpy()
        assert loss == pytest.approx([-chances[i, token] for i, token in enumerate(row[1:])], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "stride", "words"),
    [("abc", None, "3 tokens of this model, too few"), (prose(20), 17, "leave out tokens")],
    ids=["short text", "long stride"],
)
def test_text_that_cannot_be_evaluated_is_rejected(text: str, stride: int | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        held_out(text, stride=stride)


def some_logits(**changes: Any) -> np.ndarray:
    shape = {"rows": 1, "length": LENGTH, "vocabulary": 160, **changes}
    return np.zeros((shape["rows"], shape["length"], shape["vocabulary"]), np.float32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (some_logits(length=1), "for 16 tokens"),
        (some_logits(vocabulary=20), "has logits for 20"),
        (np.full_like(some_logits(), np.nan), "not finite"),
    ],
    ids=["last token only", "small vocabulary", "not a number"],
)
def test_invalid_logits_are_rejected(given: np.ndarray, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        TASK.collect({"logits": given}, held_out(prose(20)), [0])


def test_models_of_different_vocabularies_are_not_compared_by_token(models: list[Any]) -> None:
    examples = held_out(prose(20))
    own_answers = collected_outputs(models[0], examples)
    other = {**own_answers, "log_probabilities": own_answers["log_probabilities"][..., :100]}
    assert TASK.compare(other, own_answers, "final", "cpu") == []
    assert TASK.compare(own_answers, own_answers, "final", "cpu")


@pytest.mark.parametrize("stride", [None, 6])
def test_trimmed_vocabulary_is_evaluated_on_the_same_text(stride: int | None, tmp_path: Path) -> None:
    """Tokens of a byte-level tokenizer have one letter per byte, so that their lengths give their text offsets."""
    source = save_mergeable_llama(tmp_path / "source")
    baseline = AutoTokenizer.from_pretrained(source.folder)
    trimmed = TorchModel.load(source.folder, TASK)
    trim(trimmed, token_ids(rows(TEXTS[1]), baseline).tolist())
    model, trimmed_tokenizer = trimmed.module, trimmed.processor
    table, evaluation = rows(*TEXTS), Evaluation(stride=stride)
    places = [
        np.cumsum([0, *map(len, vocabulary.convert_ids_to_tokens(token_ids(table, vocabulary)))])
        for vocabulary in (baseline, trimmed_tokenizer)
    ]
    ids, counted, text = token_ids(table, trimmed_tokenizer), stride or LENGTH - 1, "\n\n".join(TEXTS).encode()
    assert places[0][-1] == places[1][-1] == len(text)
    for starts in places:  # a token within a character begins where the character does
        while (inside := np.array([byte & 0xC0 == 0x80 for byte in (*text, 0)])[starts]).any():
            starts -= inside
    losses, sizes = [], []
    for begin in range(0, len(places[0]) - LENGTH, stride or LENGTH):
        bounds = places[0][[begin, begin + LENGTH - counted, begin + LENGTH]]
        first, scored, end = np.searchsorted(places[1], bounds)
        log_chances = logits(model, Examples([{"input_ids": ids[first:end]}], {}), 0)[0].log_softmax(-1)
        token_scores = [
            float(log_chances[position - 1, ids[first + position]])
            for position in range(max(scored - first, 1), end - first)
        ]
        losses.append(-sum(token_scores))
        sizes.append(bounds[2] - bounds[1])
    examples = TASK.eval_examples_like(table, trimmed_tokenizer, None, LENGTH, evaluation, lambda: baseline)
    measured = by_metric(TASK.measure(collected_outputs(model.eval(), examples), examples.labels, "final", "cpu"))
    assert measured["perplexity"].raw == pytest.approx(np.array(losses) / counted, rel=1e-4)
    assert measured["perplexity"].value == pytest.approx(math.exp(np.mean(losses) / counted), rel=1e-4)
    assert measured["bits_per_byte"].value == pytest.approx(sum(losses) / sum(sizes) / math.log(2), rel=1e-4)
    assert np.mean(measured["bits_per_byte"].raw) == pytest.approx(measured["bits_per_byte"].value)
    assert "next_token_accuracy" not in measured and len({len(example["input_ids"]) for example in examples.inputs}) > 1
    usual = TASK.eval_examples(table, baseline, None, LENGTH, evaluation)
    assert len(usual) == len(examples) and f"a vocabulary of {len(trimmed_tokenizer)} tokens" in examples.note
    same = TASK.eval_examples_like(
        table, baseline, None, LENGTH, evaluation, lambda: AutoTokenizer.from_pretrained(source.folder)
    )
    assert [example["input_ids"].tolist() for example in same.inputs] == [
        example["input_ids"].tolist() for example in usual.inputs
    ]


@pytest.mark.parametrize("stride", [None, 6])
def test_slice_has_windows_entirely_within_chosen_rows(stride: int | None) -> None:
    texts = ["abc" * 9, "é" * 20, "", "bca" * 9, "cab" * 20]
    chosen = np.array([True, False, True, True, False])
    examples = TASK.eval_examples(rows(*texts), tiny_tokenizer(), None, LENGTH, Evaluation(stride=stride))
    # The row of each byte, which is one token here; the blank line after a row belongs to that row.
    owners = np.concatenate([np.full(len(text.encode()) + 2, row) for row, text in enumerate(texts)])
    counted = stride or LENGTH - 1
    expected = [
        bool(chosen[owners[begin + LENGTH - counted : begin + LENGTH]].all())
        for begin in range(0, len(owners) - 2 - LENGTH + 1, stride or LENGTH)
    ]
    assert TASK.members(rows(*texts), chosen, examples).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_folder_without_model_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="text-generation"):
        TASK.load(tmp_path, None, trust_remote_code=False)


def test_labels_in_data_config_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "once upon a time"}\n')
    config = DataConfig(splits={"test": "test.jsonl"}, labels=("sad", "glad"))
    with pytest.raises(DataError, match="has no labels"):
        load_dataset(config, TASK.columns, tmp_path, SilentProgress())
