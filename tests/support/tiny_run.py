"""A tiny recipe: a two-layer BERT in a folder, CSV files of a toy task, and functions that run it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stage_context
import torch
from forked import Forked
from stage_context import Notes as Notes
from tiny import label_maps
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from compress.recipe.recipe import Recipe

TASK = "text-classification"
LABELS = ("bad", "good")
POLAR = {"good": ("great", "lovely", "superb", "moving"), "bad": ("awful", "boring", "clumsy", "dreadful")}
PLAIN = ("the", "film", "plot", "cast", "music", "scene", "story", "end", "was", "felt", "seemed", "very", "quite")
UNUSED = ("zebra", "quartz", "violin", "harbour", "lantern", "walnut")
"""Words of the tokenizer that occur in no row, for `trim_vocabulary` to remove."""
BENCHMARK: dict[str, Any] = {"threads": 1, "budget_seconds": 0.1, "examples": 16, "batch_size": 8, "launches": 2}
"""One launch per model, which ends with its time budget, because tests need a timing but not a precise one."""
ROWS = {"train": 120, "validation": 40, "test": 60}
STAGES: tuple[dict[str, Any], ...] = (
    {"finetune": {"epochs": 1, "batch_size": 4, "learning_rate": 2e-3}},
    {"distill": {"student": {"layers": [0]}, "epochs": 1, "batch_size": 4, "learning_rate": 2e-3}},
    {"prune": {"feed_forward": 0.5, "importance_examples": 32}},
    {"trim_vocabulary": {}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
LABELS_OF_STAGES = ("finetune", "distill", "prune", "trim_vocabulary", "onnx", "onnx_int8")


def write_rows(folder: Path, seed: int = 0) -> None:
    """Write ``train.csv``, ``validation.csv`` and ``test.csv`` without duplicate texts."""
    chance = random.Random(seed)
    seen: set[str] = set()
    for split, count in ROWS.items():
        lines = ["text,label"]
        while len(lines) <= count:
            label = LABELS[len(lines) % 2]
            words = chance.sample(PLAIN, chance.randrange(2, 7)) + chance.sample(POLAR[label], 2)
            chance.shuffle(words)
            text = " ".join(words)
            if text not in seen:
                seen.add(text)
                lines.append(f"{text},{label}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def tokenizer() -> BertTokenizer:
    """Return a WordPiece tokenizer with the letters, all words of the task and some unused words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = (
        *special,
        *letters,
        *(f"##{letter}" for letter in letters),
        *PLAIN,
        *POLAR["good"],
        *POLAR["bad"],
        *UNUSED,
    )
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, model_max_length=32)


def write_model(folder: Path, labels: Sequence[str] | None = None) -> None:
    """Write a two-layer BERT, with a classification head if ``labels`` are given."""
    words = tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    maps = label_maps(labels) if labels else {}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.1, **sizes, **maps)
    torch.manual_seed(0)
    (BertForSequenceClassification if labels else BertModel)(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write_recipe(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """Write a recipe for ``model/`` and the CSV files in ``folder``; ``changes`` replace its top-level fields."""
    files = {split: f"{split}.csv" for split in ROWS}
    fields = {"stages": STAGES, "max_length": 16, "baseline": "finetune", "benchmark": BENCHMARK, **changes}
    return stage_context.write_recipe(folder, fields.pop("task", TASK), files, fields.pop("stages"), name, **fields)


def write_all(folder: Path, **changes: Any) -> Path:
    """Write model, data and recipe into ``folder`` and return the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_rows(folder)
    return write_recipe(folder, **changes)


def command(*arguments: str | Path) -> list[str]:
    """Return the command line as a user would start it."""
    return [sys.executable, "-m", "compress", *map(str, arguments)]


def surroundings(**changes: str) -> dict[str, str]:
    """Return environment variables for a command: one thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **changes}


def start(*arguments: str | Path, folder: Path | None = None, **changes: str) -> Forked:
    """Start a command in a forked process that has already imported the libraries."""
    return Forked([*map(str, arguments)], folder or Path.cwd(), surroundings(**changes))


def compress(
    *arguments: str | Path, folder: Path | None = None, timeout: float = 600, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` in a forked process and wait for it."""
    process = start(*arguments, folder=folder, **changes)
    try:
        stdout, stderr = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode or 0, stdout, stderr)


def start_anew(*arguments: str | Path, folder: Path | None = None, **changes: str) -> subprocess.Popen[str]:
    """Start the command line in a new Python process, as a user does."""
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=surroundings(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def compress_anew(
    *arguments: str | Path, folder: Path | None = None, timeout: float = 600, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new Python process in ``folder``, as a user does, and wait for it."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=surroundings(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def latest(artifacts: Path, name: str = "tiny") -> Path:
    """Return the folder of the recipe's latest run."""
    return (artifacts / "runs" / name / "latest").resolve()


def stage_digests(artifacts: Path, name: str = "tiny") -> dict[str, str]:
    """Return label -> digest of each stage's files from the lock file of the latest run."""
    lock = json.loads((latest(artifacts, name) / "lock.json").read_text())
    digests: dict[str, str] = lock["stages"]
    return digests


def cached_stages(report: dict[str, Any]) -> dict[str, bool]:
    """Return label -> whether the stage was a cache hit, from the content of a `report.json`."""
    return {stage["name"]: stage["cached"] for stage in report["stages"]}


def read_report(artifacts: Path, name: str = "tiny") -> dict[str, Any]:
    """Return the content of `report.json` of the latest run."""
    found: dict[str, Any] = json.loads((latest(artifacts, name) / "report.json").read_text())
    return found


def load(path: Path, *overrides: str) -> Recipe:
    """Return the recipe at ``path`` with ``overrides`` applied."""
    from compress.recipe.loading import read_recipe

    return read_recipe(path, overrides)
