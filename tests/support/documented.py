"""Code blocks of documentation pages, and small models and data that stand in for those that the blocks name."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_generation
import tiny_images
import tiny_pairs
import tiny_places
import tiny_questions
import tiny_run
import tiny_speech
import tiny_tasks
import tiny_towers
import torch
import transformers
from mergeable import save_mergeable_llama
from quantized import save_tiny_llama
from sentences import encoder

from compress.models.sentence_modules import Normalize, SentenceModules

ROOT = Path(__file__).parents[2]


class Block(NamedTuple):
    """Code block of a page: its language, the file that it is the content of, and its text."""

    language: str
    file: str | None
    text: str


def code_blocks(page: str) -> list[Block]:
    """Return the code blocks of a page, which is a path in the repository. `text` is the language of outputs."""
    fences = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(language, file or None, text) for language, file, text in fences if language != "text"]


class Setting(NamedTuple):
    """What a recipe of a page needs to run: a function that writes small models and data, and further fields."""

    prepare: Callable[[Path], None]
    fields: dict[str, Any] = {}
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


QUICK: dict[str, dict[str, Any]] = {
    "finetune": {"epochs": 1, "batch_size": 8},
    "distill": {"epochs": 1, "batch_size": 8},
    "qat": {"epochs": 1, "batch_size": 8},
    "gptq": {"samples": 4, "sequence_length": 16},
    "tune_scales": {"steps": 2, "batch_size": 1, "sequence_length": 32},
    "imatrix": {"samples": 4, "sequence_length": 16},
    "distill_language_model": {"budget": None, "tokens": 128, "batch_size": 2},
}
"""Fields of stages that are changed for the tests: the models are tiny, and the result does not matter."""


def complete(block: Block, setting: Setting) -> dict[str, Any]:
    """Return the fields of a recipe that has all stages of a block, and what the block does not say."""
    import yaml

    written = yaml.safe_load(block.text)
    written = {"stages": written} if isinstance(written, list) else written
    fields = {"name": "mine", "benchmark": tiny_run.BENCHMARK, **written, **setting.fields}
    fields["stages"] = [*setting.before, *written.get("stages", ()), *setting.after]
    return fields


def quick(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with little training, and with limits that few test rows can decide."""
    stages: list[Any] = []
    for stage in fields["stages"]:
        kind, own = (stage, {}) if isinstance(stage, str) else next(iter(stage.items()))
        changed = {**own, **QUICK.get(kind, {})}
        stages.append({kind: {name: value for name, value in changed.items() if value is not None}})
    limits = [limit | ({"at_least": 0.5} if "at_least" in limit else {}) for limit in fields.get("limits", ())]
    return fields | {"stages": stages, "limits": limits}


def deepen(folder: Path, layers: int) -> None:
    """Replace the model of a folder by one with more layers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def rename(folder: Path, suffix: str, old: str = "", new: str = "") -> None:
    """Rename the validation split to `dev`, and a column of all splits."""
    (folder / f"validation.{suffix}").rename(folder / f"dev.{suffix}")
    for split in ("train", "dev", "test"):
        path = folder / f"{split}.{suffix}"
        path.write_text(path.read_text().replace(old, new) if old else path.read_text())


def reviews(folder: Path) -> None:
    tiny_run.write_model(folder / "model")
    deepen(folder / "model", 6)
    tiny_run.write_rows(folder)
    rename(folder, "csv", "text,label", "review,sentiment")


def boxes(folder: Path) -> None:
    tiny_places.write_model(folder / "model", "yolos")
    for seed, (split, count) in enumerate(tiny_places.ROWS.items()):
        lines = []
        for number, row in enumerate(tiny_places.scenes(count, seed)):
            name = f"{split}-{number}.png"
            (folder / name).write_bytes(row["image"])
            lines.append(json.dumps({"image": name, "objects": row["objects"]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def pairs(folder: Path) -> None:
    encoder(SentenceModules(32, steps=(Normalize(),))).save(folder / "model")
    deepen(folder / "model", 6)
    tiny_pairs.write_pairs(folder)
    rename(folder, "csv")


def names(folder: Path) -> None:
    tiny_tasks.write_model(folder / "model", "token-classification")
    deepen(folder / "model", 6)
    for split, rows in tiny_tasks.rows("token-classification"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rename(folder, "jsonl", '"tags"', '"ner_tags"')


def photos(folder: Path) -> None:
    """Write `photos/` with a folder for each split, and models of images."""
    tiny_images.write_class_folders(folder / "photos")
    models = {"vit": tiny_images.vit(), "fashion-vit": tiny_images.vit(1), "residual-net": tiny_images.mobile_net()}
    for name, model in models.items():
        (folder / name).mkdir()
        model.save(folder / name)


def deep_photos(folder: Path) -> None:
    photos(folder)
    deepen(folder / "vit", 12)


NET = """
from torch import nn


def build(classes):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *head)
"""


def plain_net(folder: Path) -> None:
    """Write a plain torch module, its weights, and images of ten classes."""
    (folder / "net.py").write_text(NET)
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    (folder / "my-weights").mkdir()
    torch.save(namespace["build"](classes=10).state_dict(), folder / "my-weights" / "net.pth")
    tiny_images.processor().save_pretrained(folder / "my-weights")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(30):
            place = folder / "photos" / split / f"class-{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(tiny_images.png(tiny_images.pixels(number % 2, generator)))


def captions(folder: Path) -> None:
    (folder / "photos").mkdir()
    tiny_towers.write_model(folder / "model")
    tiny_towers.write_model(folder / "my-smaller-clip")
    tiny_towers.write_splits(folder / "photos")
    rename(folder / "photos", "jsonl", '"text"', '"caption"')


def questions(folder: Path) -> None:
    (folder / "photos").mkdir()
    tiny_questions.write_model(folder / "model")
    tiny_questions.write_splits(folder / "photos")
    rename(folder / "photos", "jsonl")
    for path in (folder / "photos").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        named = [{"image": row["image"], "question": row["text"], "answer": row["target"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in named))


def texts(folder: Path) -> None:
    save_tiny_llama(folder / "model", num_hidden_layers=12)
    tiny_generation.write_texts(folder, words=240)


def wide_texts(folder: Path) -> None:
    """Write a model whose rows are multiples of 256, as K-quants need."""
    save_mergeable_llama(folder / "model", hidden_size=256, intermediate_size=256)
    tiny_generation.write_texts(folder, words=240)


def calls(folder: Path) -> None:
    """Write the model of the page's program, and a NumPy file for each call."""
    program = next(block for block in code_blocks("docs/tutorials/onnx-file.md") if block.file == "make_model.py")
    subprocess.run([sys.executable, "-c", program.text], cwd=folder, check=True, capture_output=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / "calls" / split).mkdir(parents=True)
        for number in range(16):
            images = generator.normal(size=(1, 3, 32, 32)).astype(np.float32)
            np.savez(folder / "calls" / split / f"{number}.npz", images=images)


def recordings(folder: Path) -> None:
    tiny_speech.write_speech(folder)
    for split in tiny_speech.SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["audio", "text"])
            writer.writeheader()
            writer.writerows(rows)


def prompts(folder: Path) -> None:
    tiny_pictures, tiny_pipelines = map(pytest.importorskip, ("tiny_pictures", "tiny_pipelines"))
    tiny_pipelines.pipeline_folder(folder / "my-pipeline")
    tiny_pictures.write_judge(folder / "my-classifier")
    tiny_pictures.write_rows(folder)


IMAGES: dict[str, Any] = {"task": "image-classification", "model": "vit"}
IMAGES["data"] = {"splits": {split: f"photos/{split}" for split in ("train", "validation", "test")}}
TEXTS: dict[str, Any] = {
    "task": "text-generation",
    "model": "model",
    "data": {"splits": {"train": "train.jsonl", "test": "test.jsonl"}, "max_length": 32},
    "evaluation": {"windows": 6, "prompts": 2, "prompt_tokens": 8, "tokens": 12},
    "benchmark": tiny_generation.ONE_LAUNCH,
}
SETTINGS: dict[str, list[Setting]] = {
    "README.md": [Setting(reviews, {"model": "model"})],
    "docs/tutorials/detection-segmentation.md": [Setting(boxes, {"model": "model"})],
    "docs/tutorials/embeddings.md": [
        Setting(pairs, {"model": "model", "evaluation": {"similarity": "rated.csv"}}),
    ],
    "docs/tutorials/encoder-tasks.md": [Setting(names, {"model": "model"})],
    "docs/tutorials/images.md": [
        Setting(photos, IMAGES, after=("onnx",)),
        Setting(photos, {**IMAGES, "model": "residual-net"}, after=("onnx",)),
        Setting(photos, {**IMAGES, "model": "residual-net"}, before=("finetune",), after=("onnx",)),
        Setting(
            plain_net,
            {"task": "image-classification", "data": {"splits": {"train": "photos/train", "test": "photos/test"}}},
            after=("onnx",),
        ),
        Setting(photos, IMAGES),
        Setting(deep_photos, {"model": "vit"}),
        Setting(captions, {"model": "model"}),
        Setting(questions, {"model": "model"}),
    ],
    "docs/tutorials/language-models.md": [
        Setting(texts, TEXTS),
        Setting(wide_texts, TEXTS),
        Setting(texts, TEXTS, after=("onnx",)),
    ],
    "docs/tutorials/onnx-file.md": [Setting(calls)],
    "docs/tutorials/speech.md": [Setting(recordings, {"model": "model"})],
    "docs/tutorials/text-to-image.md": [Setting(prompts)],
}
"""Page -> settings of its YAML blocks in their order, without those that are the content of a file."""
