"""A tiny recipe for embeddings: a sentence encoder in a folder, CSV files of pairs, and the recipe."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import stage_context
from sentences import encoder, pairs

from compress.models.sentence_modules import Normalize, SentenceModules

ROWS = {"train": 64, "validation": 16, "test": 40}


def write_pairs(folder: Path) -> None:
    """Write ``train.csv``, ``validation.csv`` and ``test.csv`` without common texts, and ``rated.csv`` with scores."""
    table = pairs(sum(ROWS.values())).to_pylist()
    start = 0
    for split, count in ROWS.items():
        _write(folder / f"{split}.csv", table[start : start + count])
        start += count
    _write(folder / "rated.csv", [row | {"score": len(row["text"])} for row in table[:12]])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write model, data and recipe into ``folder``; ``changes`` replace top-level fields of the recipe."""
    (folder / "model").mkdir(parents=True)
    encoder(SentenceModules(32, steps=(Normalize(),))).save(folder / "model")
    write_pairs(folder)
    training = {"epochs": 1, "batch_size": 16, "learning_rate": 2e-3}
    fields: dict[str, Any] = {
        "stages": [
            {"trim_vocabulary": {}},
            {"distill": {"teacher": "start", "student": {"layers": [1]}, **training}},
            {"reduce_dimensions": {"dimensions": 16}},
            {"onnx": {"sentence_embedding": True}},
            {"onnx_int8": {"embedding_bits": 4}},
        ],
        "max_length": 16,
        "evaluation": {"similarity": "rated.csv", "index": "baseline"},
        "benchmark": {"threads": 1, "budget_seconds": 0.1, "examples": 16, "batch_size": 8, "launches": 2},
        "limits": [{"metric": "size_bytes", "at_most": 0.9, "of": "baseline"}],
        **changes,
    }
    splits = {split: f"{split}.csv" for split in ROWS}
    task = fields.pop("task", "feature-extraction")
    return stage_context.write_recipe(folder, task, splits, fields.pop("stages"), **fields)
