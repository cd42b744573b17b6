"""A tiny sentence encoder, and pairs of matching texts that share most of their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from stage_context import stage_context
from tiny import BAD, GOOD, NEUTRAL, SIZES, WIDTH, shaken, word_piece
from transformers import BertConfig, BertModel

from compress.data.dataset import Dataset
from compress.models.model import TorchModel
from compress.models.processor import SentenceProcessor
from compress.models.sentence_modules import SentenceModules
from compress.stages.base import Context
from compress.tasks.registry import TASKS

TASK = "feature-extraction"
OTHERWISE = dict(zip((*GOOD[::2], *BAD[::2]), (*GOOD[1::2], *BAD[1::2]), strict=True))
"""Polar word of a text -> the word that replaces it in the paired text."""


def pairs(count: int, seed: int = 0) -> pa.Table:
    """Return ``count`` rows of text and pair without duplicate texts.

    The pair has the words of the text in another order, with polar words replaced by others of the same sentiment.
    """
    generator = np.random.default_rng(seed)
    pair_of: dict[str, str] = {}
    while len(pair_of) < count:
        length = int(generator.integers(3, 9))
        words = [*generator.choice(NEUTRAL, length, replace=False), *generator.choice([*OTHERWISE], 2, replace=False)]
        other = [OTHERWISE.get(str(word), str(word)) for word in words]
        pair_of[" ".join(generator.permutation(words))] = " ".join(generator.permutation(other))
    return pa.table({"text": [*pair_of], "pair": [*pair_of.values()]})


def dataset(train: int = 48, validation: int = 0, test: int = 24) -> Dataset:
    """Return train and test splits of pairs, and a validation split if ``validation`` is positive."""
    tables = {"train": pairs(train, seed=1), "test": pairs(test, seed=2)}
    if validation:
        tables["validation"] = pairs(validation, seed=3)
    return Dataset(TASKS[TASK].columns, tables, ())


def encoder(modules: SentenceModules | None = None, seed: int = 0, **changes: Any) -> TorchModel:
    """Return a BERT without a pooler, with random weights large enough for outputs to differ between inputs."""
    tokenizer = word_piece()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig(**ids, **{**SIZES, **changes})
    torch.manual_seed(seed)
    module = shaken(BertModel(config, add_pooling_layer=False))
    return TorchModel(module, SentenceProcessor(tokenizer, modules or SentenceModules(WIDTH)))


def context(data: Dataset | None = None, max_length: int = 24) -> Context:
    """Return a stage context for the toy task."""
    return stage_context(TASK, data or dataset(), max_length)


def write_folder(folder: Path, kinds: Sequence[str], **files: dict[str, Any]) -> None:
    """Write the module files of sentence-transformers, as in `write_folder(f, ["Pooling"], Pooling={...})`."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, kind in enumerate(kinds, start=1):
        path = f"{index}_{kind}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(parents=True)
        (folder / path / "config.json").write_text(json.dumps(files.get(kind, {})))
    (folder / "modules.json").write_text(json.dumps(entries))
