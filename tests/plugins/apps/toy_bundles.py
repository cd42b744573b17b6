"""Hand-written ONNX classifiers of texts and images and a sentence encoder, and helpers to bundle them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx_graphs import onnx_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from compress.formats.onnx.model import OnnxModel
from compress.formats.targets import find_app_profile
from compress.models.processor import SentenceProcessor
from compress.models.sentence_modules import SentenceModules
from compress.plugins.apps.build import BundleRequest
from compress.plugins.apps.manifest import MANIFEST, Manifest
from compress.recipe.loading import read_recipe
from compress.utils.storage import FileRecord, digest_file

RECIPE = """name: toy
task: text-classification
model: sample:minilm
data: {source: sample:movie-reviews, max_length: 16}
stages: [onnx]
"""


LABELS = ("bad", "good")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", "great", "a", "lovely", "plot", "awful", "##s", "!")
WIDTH = 256
_CHANCE = np.random.default_rng(0)
EMBEDDINGS = _CHANCE.normal(size=(len(WORDS), WIDTH)).astype(np.float32)
MATRIX = _CHANCE.normal(size=(WIDTH, len(LABELS))).astype(np.float32)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with BERT's normalization and special tokens."""
    word_tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    word_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    word_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    word_tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=word_tokenizer, model_max_length=40, **special)


IDS = {name: (TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")}


def graph() -> onnx.ModelProto:
    """Return a graph that averages the token embeddings [batch, length, WIDTH] and multiplies them to logits."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["kept"]),
        helper.make_node("ReduceMean", ["kept", "middle"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["logits"]),
    ]
    stored = {"table": EMBEDDINGS, "matrix": MATRIX, "last": np.array([2]), "middle": np.array([1])}
    return onnx_model(nodes, IDS, {"logits": ["batch", len(LABELS)]}, stored, opset=18, ir_version=9)


def write_folder(folder: Path, recipe: str, model: onnx.ModelProto, processor: Any, config: dict[str, Any]) -> Path:
    """Write model/ and recipe.yaml, the parts of a run folder that a bundle reads."""
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    OnnxModel(model, "model.onnx", {}).save(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder


def write_run(folder: Path) -> Path:
    """Write the run folder of a text classifier."""
    config = {"model_type": "bert", "id2label": dict(enumerate(LABELS))}
    return write_folder(folder, RECIPE, graph(), tokenizer(), config)


IMAGE_RECIPE = """name: toy-images
task: image-classification
model: ./nowhere
data: {splits: {train: ./train, test: ./test}}
stages: [onnx]
"""
SIDE = 16
IMAGE_MATRIX = _CHANCE.normal(size=(3 * SIDE * SIDE, len(LABELS))).astype(np.float32)


def product_graph(name: str, axes: list[int], matrix: np.ndarray) -> onnx.ModelProto:
    """Return a graph that flattens its input and multiplies it with ``matrix``."""
    nodes = [helper.make_node("Flatten", [name], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["logits"])]
    ends = {name: ["batch", *axes]}, {"logits": ["batch", matrix.shape[1]]}
    return onnx_model(nodes, *ends, {"matrix": matrix}, opset=18, ir_version=9)


def write_image_run(folder: Path) -> Path:
    """Write the run folder of an image classifier whose processor resizes and center-crops."""
    size, crop = {"shortest_edge": SIDE + 4}, {"height": SIDE, "width": SIDE}
    scale = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    processor = ViTImageProcessorPil(size=size, crop_size=crop, do_center_crop=True, resample=3, **scale)
    config = {"model_type": "vit", "id2label": dict(enumerate(LABELS))}
    model = product_graph("pixel_values", [3, SIDE, SIDE], IMAGE_MATRIX)
    return write_folder(folder, IMAGE_RECIPE, model, processor, config)


def encoder_graph(pooled: bool = False) -> onnx.ModelProto:
    """Return a graph that outputs token embeddings; if ``pooled``, also the first token's as `sentence_embedding`."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["last_hidden_state"]),
    ]
    stored = {"table": EMBEDDINGS, "last": np.array([2])}
    outputs: dict[str, list[str | int]] = {"last_hidden_state": ["batch", "length", WIDTH]}
    if pooled:
        nodes.append(helper.make_node("Gather", ["last_hidden_state", "zero"], ["sentence_embedding"], axis=1))
        stored["zero"], outputs["sentence_embedding"] = np.array(0), ["batch", WIDTH]
    return onnx_model(nodes, IDS, outputs, stored, opset=18, ir_version=9)


def write_encoder_run(folder: Path, modules: SentenceModules, pooled: bool = False) -> Path:
    """Write the run folder of a sentence encoder with these modules."""
    recipe = RECIPE.replace("text-classification", "feature-extraction")
    processor = SentenceProcessor(tokenizer(), modules)
    return write_folder(folder, recipe, encoder_graph(pooled), processor, {"model_type": "bert"})


def wanted_of(run: Path, target: str = "desktop", **more: object) -> BundleRequest:
    """Return the request to bundle such a folder."""
    recipe = run / "recipe.yaml"
    fields = {"model": run / "model", "recipe": read_recipe(recipe), "recipe_file": recipe}
    return BundleRequest(**{**fields, "profile": find_app_profile(target), **more})  # type: ignore[arg-type]


def reseal(folder: Path, change: Callable[[dict[str, object]], None] = lambda fields: None) -> None:
    """Forge a valid seal: change the manifest, update every file's size and digest, and seal it again."""
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    for name in fields["files"]:
        path = folder / name
        fields["files"][name] = FileRecord(size_bytes=path.stat().st_size, sha256=digest_file(path)).model_dump()
    (folder / MANIFEST).write_bytes(Manifest.model_validate(fields).sealed())


def set_field(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets the entry at a dotted path."""

    def change(fields: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        entry: Any = fields
        for name in parents:
            entry = entry[int(name) if name.isdigit() else name]
        entry[int(last) if last.isdigit() else last] = value

    return change


@contextmanager
def changed_json(path: Path) -> Iterator[Any]:
    """Yield the content of a JSON file, and write it back with the changes made."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def run_example(folder: Path, *arguments: str) -> str:
    """Return the standard output of the bundle's Python example."""
    command = [sys.executable, str(folder / "examples" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
