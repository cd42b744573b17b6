"""Tests of greedy generation in ONNX Runtime against numpy, and of the detection of repetition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from decoder_graphs import TinyDecoder

from compress.evaluation.generate import (
    FallenToken,
    choose_prompts,
    continue_prompts,
    end_tokens,
    find_fallen_tokens,
    looping_row,
    repetition_note,
    repetition_row,
    token_probabilities,
)
from compress.formats.targets import TARGETS
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress

PROMPTS = [[1, 2, 3], [40, 7]]


def written(folder: Path, tokens: int) -> list[list[int]]:
    return continue_prompts(folder, PROMPTS, tokens, TARGETS["cpu"], 1, SilentProgress(), "")


@pytest.mark.parametrize("cache", [True, False])
def test_generation_is_greedy(tmp_path: Path, cache: bool) -> None:
    decoder = TinyDecoder()
    expected = [decoder.continuation(prompt, 9) for prompt in PROMPTS]
    assert written(decoder.write(tmp_path, cache=cache), 9) == expected


def test_generation_stops_at_the_end_token(tmp_path: Path) -> None:
    decoder = TinyDecoder()
    folder = decoder.write(tmp_path)
    first, other = (decoder.continuation(prompt, 9) for prompt in PROMPTS)
    end = first[3]
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert written(folder, 9) == [text[: text.index(end) + 1] if end in text else text for text in (first, other)]
    assert len(written(folder, 9)[0]) <= 4


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 2}}, {2}),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {}}, {2}),
        ({"config.json": {"eos_token_id": None}}, set()),
    ],
)
def test_end_tokens(tmp_path: Path, files: dict[str, dict[str, object]], expected: set[int]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path) == expected


def test_prompts_are_starts_of_evenly_spaced_windows() -> None:
    examples = Examples([{"input_ids": np.arange(start, start + 8)} for start in range(0, 90, 10)], {"input_ids": 0})
    assert choose_prompts(examples, Evaluation(prompts=3, prompt_tokens=2)) == [[0, 1], [40, 41], [80, 81]]
    assert choose_prompts(examples, Evaluation(prompts=0)) == []
    assert len(choose_prompts(examples, Evaluation(prompts=99))) == 9


def test_repetition_is_the_mean_over_prompts() -> None:
    row = repetition_row([[1, 2, 3, 4, 1, 2, 3, 4], [5] * 8, [1, 2]], "final", "cpu")
    assert row.value == pytest.approx((1 / 5 + 4 / 5 + 0) / 3)
    assert row.raw == pytest.approx((1 / 5, 4 / 5, 0.0))


def test_only_models_more_repetitive_than_the_baseline_are_named() -> None:
    varied, circling = [list(range(start, start + 20)) for start in range(8)], [[1, 2] * 10] * 8
    fine, bad = repetition_row(varied, "baseline", "cpu"), repetition_row(circling, "final", "cpu")
    note = repetition_note(bad, fine)
    assert note is not None and note.startswith("final repeats itself: 88% of its 4-grams") and "0% of the" in note
    assert repetition_note(bad, bad) is None
    assert repetition_note(fine, bad) is None
    once = repetition_row([*varied[:7], circling[0]], "final", "cpu")
    assert repetition_note(once, fine) is None, "one text of eight may be chance"


def test_fallen_tokens_are_listed_with_their_context() -> None:
    windows = [{"input_ids": np.arange(start, start + 4)} for start in (10, 20)]
    old = -np.log([[0.9, 0.5, 0.2], [0.8, 0.4, 0.5]])
    tokens = find_fallen_tokens(Examples(windows, {}), old, -np.log([[0.1, 0.5, 0.9], [0.2, 0.3, 0.4]]))
    assert [(token.before, token.token) for token in tokens] == [
        ([10], 11),
        ([20], 21),
        ([20, 21], 22),
        ([20, 21, 22], 23),
    ]
    assert tokens[1] == FallenToken([20], 21, pytest.approx(0.8), pytest.approx(0.2))


@pytest.mark.parametrize("cache", [True, False])
def test_generated_tokens_have_their_and_the_runner_up_probability(tmp_path: Path, cache: bool) -> None:
    decoder = TinyDecoder()
    folder = decoder.write(tmp_path, cache=cache)
    texts = [decoder.continuation(PROMPTS[0], 5), [3, 1, 2]]  # the latter is not what the model would generate
    probabilities = token_probabilities(folder, PROMPTS, texts, TARGETS["cpu"], 1, SilentProgress(), "")
    for prompt, text, steps in zip(PROMPTS, texts, probabilities, strict=True):
        assert [step.token for step in steps] == text
        for position, step in enumerate(steps):
            logits = decoder.logits([*prompt, *text[:position]])[-1].astype(np.float64)
            chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            others = [token for token in np.argsort(-chances) if token != text[position]]
            assert step.other == others[0]
            expected = chances[text[position]], chances[others[0]]
            assert (step.probability, step.other_probability) == pytest.approx(expected, rel=1e-4)


def test_texts_ending_in_a_loop_are_counted() -> None:
    once, twice = list(range(40)), [*range(30), *range(24, 30)]
    row = looping_row([once, twice, [9, 8, *[1, 2, 3, 4, 5, 6, 7, 8] * 2]], "final", "cpu")
    assert (row.metric, row.raw) == ("looping", (0.0, 0.0, 1.0))
    assert row.low is not None and row.high is not None and row.low < row.value == 1 / 3 < row.high
