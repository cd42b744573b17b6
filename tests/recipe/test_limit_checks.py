"""Limits on metrics that a recipe cannot measure, and bounds that cannot be meant, are refused with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.recipe.loading import read_recipe
from compress.utils.errors import RecipeError

TEXT_TO_TEXT = {"task": "text2text-generation", "stages": [{"onnx": {}}]}
DECODER = {"task": "text-generation", "stages": [{"onnx": {}}]}


def read(folder: Path, limits: list[dict[str, Any]], **fields: Any) -> object:
    recipe = {
        "name": "limits",
        "task": "text-classification",
        "model": "no-such-owner/model",
        "data": {"splits": {"train": "train.csv", "test": "test.csv"}},
        "stages": [{"finetune": {}}, {"onnx": {}}],
        "limits": limits,
    }
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, **fields}, indent=1))
    return read_recipe(folder / "recipe.yaml")


def refusal(folder: Path, limit: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, [limit], **fields)
    (problem,) = caught.value.problems
    assert problem.line is not None
    lines = (folder / "recipe.yaml").read_text().splitlines()
    assert f'"{problem.field.rpartition(".")[2]}": ' in lines[problem.line - 1]
    return str(problem)


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [("acuracy", "accuracy"), ("acc", "accuracy"), ("latency", "latency_ms"), ("Accuracy", "accuracy")],
)
def test_unknown_metric_is_refused_with_nearest_name(metric: str, nearest: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, {"metric": metric, "at_least": 0.5})
    assert f"an unknown metric {metric!r}" in text
    # The long list of metrics is shown only if none is similar.
    assert text.endswith(f"expected a metric that this recipe measures. Did you mean {nearest!r}?")
    text = refusal(tmp_path, {"metric": "qqq", "at_least": 0.5})
    assert "such as accuracy, f1, calibration_error, brier_score, agreement, size_bytes" in text


@pytest.mark.parametrize(
    ("metric", "fields"),
    [
        ("perplexity", {}),
        ("perplexity[label=a]", {}),
        ("frechet_distance", {}),
        ("tokens_per_second_context_128", {}),
        ("latency_ms_batch_64", {}),
        ("throughput", {"benchmark": {"batched": False}}),
        ("latency_ms_rate_20", {"benchmark": {"rate": 10}}),
        ("accuracy", DECODER),
        ("accuracy", TEXT_TO_TEXT),
        ("latency_ms", DECODER),
        ("choice_accuracy", DECODER),
        ("repetition", {**DECODER, "evaluation": {"prompts": 0}}),
        ("tokens_per_second_context_64", {**DECODER, "benchmark": {"contexts": [32, 128]}}),
        ("index_recall_at_10", {"task": "feature-extraction", "stages": [{"onnx": {}}]}),
    ],
)
def test_metric_that_this_recipe_does_not_measure_is_refused(
    metric: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    assert "which no run of this recipe measures" in refusal(tmp_path, {"metric": metric, "at_least": 0.5}, **fields)


@pytest.mark.parametrize(
    ("metrics", "fields"),
    [
        (
            "accuracy accuracy[label=a] f1 agreement agreement_against_torch size_bytes shipped_bytes speedup "
            "latency_ms latency_p99_ms latency_ms_length_4_9 latency_ms_batch_16 throughput startup_ms "
            "peak_memory_bytes_batch_16 latency_p99_ms_rate_2.5 energy_mj cpu_ms",
            {"benchmark": {"batch_size": 16, "rate": 2.5}},
        ),
        (
            "perplexity perplexity_on_code perplexity_on_code[strings] choice_accuracy tokens_per_second_context_64 "
            "speedup_time_per_output_token_context_64 bits_per_parameter kl_divergence looping answer_perplexity",
            {**DECODER, "benchmark": {"contexts": [64]}, "evaluation": {"questions": "questions.jsonl"}},
        ),
        ("chrf bleu rouge_l exact_match", TEXT_TO_TEXT),
        (
            "recall_at_10_int8 embedding_bytes embedding_cosine spearman_news index_recall_at_10 index_ndcg_at_10 "
            "index_recall_at_10_binary",
            {
                "task": "feature-extraction",
                "stages": [{"onnx": {}}],
                "evaluation": {"similarity": "pairs.csv", "index": "baseline"},
            },
        ),
    ],
)
def test_measurable_metrics_are_accepted(metrics: str, fields: dict[str, Any], tmp_path: Path) -> None:
    limits = [{"metric": metric, "at_least": 0.5, "of": "baseline"} for metric in metrics.split()]
    assert read(tmp_path, limits, **fields)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"metric": "accuracy", "at_least": 98.5}, "a share between 0 and 1; 98.5 percent is 0.985"),
        ({"metric": "accuracy[label=a]", "at_least": 98.5}, "98.5 percent is 0.985"),
        ({"metric": "agreement", "at_least": 99}, "99 percent is 0.99"),
        ({"metric": "calibration_error", "at_most": 5}, "5 percent is 0.05"),
        ({"metric": "accuracy", "at_least": 98.5, "of": "baseline"}, "98.5 percent is 0.985"),
        ({"metric": "size_bytes", "at_most": 0.3}, "`of: baseline`"),
    ],
)
def test_bound_that_cannot_be_meant_is_refused(limit: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, limit)


def test_possible_bounds_are_accepted(tmp_path: Path) -> None:
    limits = [
        {"metric": "accuracy", "at_least": 1},
        {"metric": "accuracy", "at_least": 1.02, "of": "baseline"},
        {"metric": "latency_ms", "at_most": 0.5},
        {"metric": "speedup", "at_least": 30},
        {"metric": "size_bytes", "at_most": 0.3, "of": "baseline"},
    ]
    assert read(tmp_path, limits)


def test_limits_are_checked_beside_other_problems(tmp_path: Path) -> None:
    limits = [{"metric": "acuracy", "at_least": 0.5}, {"metric": "f1"}, {"metric": "f1", "at_least": 80}]
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, limits, seed="x", benchmark={"batch_size": 0})
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"seed", "benchmark.batch_size", "limits.0.metric", "limits.1", "limits.2.at_least"}
