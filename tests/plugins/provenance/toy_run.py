"""A hand-written run folder with a model of a few bytes, recipe, lock and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.pipeline.licences import find_licences
from compress.pipeline.run import with_absolute_paths
from compress.recipe.loading import dump_recipe
from compress.recipe.recipe import Recipe
from compress.results.report import DataRecord, Measurement, Report, StageRecord

DIGESTS = {"train": "1" * 64, "test": "2" * 64}
ROWS = (
    Measurement(model="final", metric="accuracy", target="cpu", value=0.875, unit="fraction", low=0.8, high=0.93, n=96),
    Measurement(model="final", metric="size_bytes", target="cpu", value=12, unit="bytes"),
    Measurement(model="baseline", metric="accuracy", target="cpu", value=0.9, unit="fraction", low=0.8, high=1, n=96),
)


def write_run(home: Path, licence: str = "cc-by-sa-4.0", **changes: Any) -> Path:
    """Write sources and a run below ``home`` and return the run's folder; ``licence`` is the source model's."""
    start = home / "start"
    start.mkdir(parents=True)
    (start / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    (start / "config.json").write_text("{}")
    for split in DIGESTS:
        (home / f"{split}.csv").write_text("text,label\nfine,good\n")
    (home / "train.csv.license").write_text("SPDX-License-Identifier: CC-BY-NC-4.0\n")
    data = {"splits": {split: f"{split}.csv" for split in DIGESTS}}
    fields = {"name": "toy", "task": "text-classification", "model": "start", "data": data, "seed": 3}
    recipe = Recipe.model_validate({**fields, "stages": ["onnx", "onnx_int8"], **changes})
    run = home / "artifacts" / "runs" / "toy" / "2026-05-02T10-00-00"
    for name, content in {"config.json": '{"model_type": "bert"}', "onnx/model.onnx": "not a graph"}.items():
        (run / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "model" / name).write_text(content)
    (run / "recipe.yaml").write_text(dump_recipe(with_absolute_paths(recipe, home)))
    lock = {"seed": 3, "threads": 1, "packages": {"compress": "0.1.0", "onnxruntime": "1.32.0"}, "data": DIGESTS}
    (run / "lock.json").write_text(json.dumps({**lock, "start": "3" * 64, "stages": {"onnx_int8": "4" * 64}}))
    report = Report(recipe="toy", description="Films, good or bad: a toy", started="2026-05-02T10:00:00+02:00",
        seconds=61.4, stages=(StageRecord(name="quantize", key="5" * 64, cached=False, seconds=1.0),),
        measurements=ROWS, data=DataRecord(digest=DIGESTS["test"], rows=96),
        environment={"processor_class": "x86-vnni", "kernel": "6.1.0-of-mine", "packages": {"onnx": "1.23.2"}},
        notes=("a note of the run",), licences=find_licences(recipe, home))  # fmt: skip
    (run / "report.json").write_text(report.to_json())
    return run
