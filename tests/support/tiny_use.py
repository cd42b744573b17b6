"""A tiny static INT8 classifier in the layout of a finished run, with its recipe and data, made without torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import tiny
import yaml
from onnx import TensorProto, helper
from onnx_graphs import onnx_model
from pyarrow import csv

RECIPE = {
    "name": "tiny",
    "task": "text-classification",
    "model": "sample:minilm",
    "data": {"splits": {"train": "train.csv", "test": "test.csv"}, "max_length": 16},
    "stages": [
        {"finetune": {"epochs": 1}},
        {"trim_vocabulary": {"min_count": 3}},
        "onnx",
        {"onnx_int8": {"method": "static", "calibration_examples": 48}},
    ],
}
LIMIT = 1.27
"""Range of the 8-bit activations: texts of the toy task stay within it, while texts of repeated words exceed it."""


def classifier(words: dict[str, int], forgets: Collection[str] = ()) -> onnx.ModelProto:
    """Return an INT8 classifier of mean embeddings that separate good from bad words, except words in ``forgets``."""
    chance = np.random.default_rng(0)
    table = chance.normal(0, 0.4, (len(words), 4)).astype(np.float32)
    for sign, kind in ((1, tiny.GOOD), (-1, tiny.BAD)):
        for word in kind:
            table[words[word], 0] = 0 if word in forgets else 3 * sign
    weights = np.float32([[-6, 6], [0, 0], [0, 0], [0, 0]])
    stored = {
        "table": table,
        "weights": weights,
        "step": np.float32(LIMIT / 127),
        "zero": np.uint8(127),
        "axis": np.int64([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], name="gather"),
        helper.make_node("ReduceMean", ["embedded", "axis"], ["pooled"], name="pool", keepdims=0),
        helper.make_node("QuantizeLinear", ["pooled", "step", "zero"], ["integers"], name="quantize"),
        helper.make_node("DequantizeLinear", ["integers", "step", "zero"], ["restored"], name="restore"),
        helper.make_node("MatMul", ["restored", "weights"], ["logits"], name="classifier"),
    ]
    ids = {"input_ids": (TensorProto.INT64, ["batch", "length"])}
    return onnx_model(nodes, ids, {"logits": ["batch", 2]}, stored, opset=21)


def write_run(folder: Path, forgets: Collection[str] = ()) -> Path:
    """Write `model/`, `recipe.yaml` and the rows of train and test into ``folder``."""
    (folder / "model" / "onnx").mkdir(parents=True)
    tokenizer = tiny.word_piece()
    tokenizer.save_pretrained(folder / "model")
    onnx.save(classifier(tokenizer.get_vocab(), forgets), folder / "model" / "onnx" / "model_quantized.onnx")
    names = dict(enumerate(tiny.LABELS))
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": len(tokenizer)}
    config |= {"id2label": names, "label2id": {name: place for place, name in names.items()}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    for split, count, seed in (("train", 120, 1), ("test", 160, 2)):
        csv.write_csv(tiny.table(count, seed), folder / f"{split}.csv")
    return folder


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str
