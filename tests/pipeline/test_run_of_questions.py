"""Questions about images go all the way: learned, written as three graphs, quantized, judged and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_questions
from tiny_run import BENCHMARK, Notes, load, write_recipe

from compress.compare.reports import compare_reports
from compress.formats.onnx.model import find_graphs
from compress.pipeline.run import Run, run
from compress.report.schema import BASELINE, FINAL

STAGES = [
    {"finetune": {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"}},
    {"export": {}},
    {"quantize": {"part": "encoder", "method": "static", "calibration_examples": 8}},
    {"quantize_weights": {"part": "decoder", "bits": 8}},
]


def _recipe(folder: Path, **changes: object) -> Path:
    tiny_questions.write_model(folder / "model")
    data = {"splits": tiny_questions.write_splits(folder), "max_length": 40}
    fields = {"task": "image-text-to-text", "data": data, "stages": STAGES, "baseline": "export"}
    return write_recipe(folder, "questions", **fields, benchmark={**BENCHMARK, "every_stage": False}, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("questions")
    path = _recipe(folder, targets=["cpu", "torch"])
    return run(load(path), folder, folder / "artifacts", Notes())


def test_what_ships_is_judged_as_the_float_graphs_are(done: Run) -> None:
    for metric in ("exact_match", "f1"):
        before, after = (done.report.find(model, metric, "cpu") for model in (BASELINE, FINAL))
        assert before is not None and after is not None and before.raw is not None and after.raw is not None
        assert len(before.raw) == len(after.raw) == 12
    shortest = done.report.find(FINAL, "exact_match[characters=Q1]", "cpu")
    assert shortest is not None and shortest.n == 6
    names = [path.name for path in find_graphs(done.folder / "model")]
    assert names == [f"{part}_quantized.onnx" for part in ("vision_encoder", "embed_tokens", "decoder_model_merged")]


def test_transformers_and_the_graphs_are_judged_alike(done: Run) -> None:
    figures = [done.report.find(BASELINE, "exact_match", target) for target in ("cpu", "torch")]
    assert figures[0] is not None and figures[1] is not None and figures[0].raw == figures[1].raw


def test_a_comparison_pairs_its_rows(done: Run) -> None:
    changes = {change.metric: change for change in compare_reports(done.report, done.report).changes}
    assert changes["exact_match"].effect == 0 and "paired" in changes["exact_match"].method
