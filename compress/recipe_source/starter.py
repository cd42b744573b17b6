"""A commented recipe to start from: every field with its description, valid as it stands."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from compress.data.config import DataConfig
from compress.recipe.recipe import Benchmark, Limit, Recipe
from compress.stages import STAGES
from compress.tasks.evaluation import Evaluation
from compress.training.config import Training

_WIDTH = 100
_HEADER = """\
A recipe for {task}. Change `model` and `data` to your own, then:

  compress check THIS-FILE    proves that it can run and predicts time, memory and disk
  compress run THIS-FILE      runs it

Fields that are commented out have the value shown. For completion in an editor, write the schema with
`compress recipes schema > recipe.schema.json` and point the editor to it."""

_TEXT_CLASSIFICATION: dict[str, Any] = {
    "name": "my-classifier",
    "description": "a smaller, faster text classifier from my own CSV files",
    "task": "text-classification",
    "model": "sample:minilm",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text", "label": "label"},
    },
    "stages": [
        {"finetune": {"epochs": 3}},
        {"prune": {"feed_forward": 0.25}},
        {"distill": {"teacher": "finetune", "student": {"layers": [0, 2, 4]}, "epochs": 5}},
        {"trim_vocabulary": {}},
        {"export": {}},
        {"quantize": {}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}
_TEXT_GENERATION: dict[str, Any] = {
    "name": "my-chat-model",
    "description": "a language model with 4-bit weights, as ONNX, calibrated and judged on my own texts",
    "task": "text-generation",
    "model": "sample:smollm2",
    "data": {
        "splits": {"train": "train.jsonl", "test": "test.jsonl"},
        "columns": {"text": "text"},
        "max_length": 512,
    },
    "stages": [{"gptq": {"bits": 4, "group_size": 64, "embedding_bits": 4}}, {"export": {}}],
    "targets": ["cpu"],
    "evaluation": {"windows": 20},
    "benchmark": {"contexts": [128], "every_stage": False},
    "limits": [{"metric": "perplexity", "at_most": 1.35, "of": "baseline"}],
}
_IMAGE_CLASSIFICATION: dict[str, Any] = {
    "name": "my-image-classifier",
    "description": "a smaller, faster image classifier from my own photographs, in a folder for each class",
    "task": "image-classification",
    "model": "google/vit-base-patch16-224",
    "data": {"splits": {"train": "photos/train", "validation": "photos/validation", "test": "photos/test"}},
    "stages": [{"finetune": {"epochs": 2}}, {"export": {}}, {"quantize": {}}],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}
_FEATURE_EXTRACTION: dict[str, Any] = {
    "name": "my-search-model",
    "description": "a smaller, faster sentence encoder for search, taught on pairs of a question and what answers it",
    "task": "feature-extraction",
    "model": "sample:minilm",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text", "pair": "pair"},
    },
    "stages": [
        {"trim_vocabulary": {}},
        {"distill": {"teacher": "start", "student": {"layers": [1, 3, 5]}, "epochs": 3}},
        {"export": {}},
        {"quantize": {}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "recall_at_10", "at_least": 0.98, "of": "baseline"}],
}
_SPEECH_RECOGNITION: dict[str, Any] = {
    "name": "my-transcriber",
    "description": "a smaller, faster Whisper, judged on my own recordings and their texts",
    "task": "automatic-speech-recognition",
    "model": "sample:whisper-tiny-en",
    "data": {
        "splits": {"train": "train.csv", "test": "test.csv"},
        "columns": {"audio": "file", "text": "text"},
    },
    "stages": [
        {"export": {}},
        {"quantize": {"part": "encoder"}},
        {"quantize_weights": {"part": "decoder", "bits": 4}},
    ],
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "word_error_rate", "at_most": 1.1, "of": "baseline"}],
}
STARTERS: dict[str, dict[str, Any]] = {
    "text-classification": _TEXT_CLASSIFICATION,
    "text-generation": _TEXT_GENERATION,
    "image-classification": _IMAGE_CLASSIFICATION,
    "feature-extraction": _FEATURE_EXTRACTION,
    "automatic-speech-recognition": _SPEECH_RECOGNITION,
}
"""The values of each task's starter; everything else in it comes from the models' fields."""


_NESTED: dict[str, type[BaseModel]] = {"data": DataConfig, "benchmark": Benchmark, "evaluation": Evaluation}


def starter(task: str) -> str:
    """The starter of a task. Raises `KeyError` for a task outside `STARTERS`."""
    values = STARTERS[task]
    lines = [f"# {line}".rstrip() for line in _HEADER.format(task=task).splitlines()]
    for name, field in Recipe.model_fields.items():
        lines += ["", *_comment(field.description)]
        if name == "stages":
            lines += ["stages:", *_stages(values["stages"])]
        elif name == "limits":
            lines += ["limits:", *_limits(values["limits"])]
        elif name in _NESTED and name in values:
            lines += _nested(name, _NESTED[name], values[name])
        else:
            lines.append(_line(name, field, values))
    return "\n".join(lines) + "\n"


def _nested(name: str, model: type[BaseModel], chosen: dict[str, Any]) -> list[str]:
    """A mapping with every field of ``model``; a comment altogether if none is chosen."""
    body = _fields(model, chosen)
    return [f"{name}:" if chosen else f"# {name}:", *textwrap.indent("\n".join(body), "  ").splitlines()]


def _stages(stages: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Every stage with all its fields; the training loop's, which several share, are explained once."""
    lines: list[str] = []
    explained: set[str] = set()
    for stage in stages:
        ((kind, chosen),) = stage.items()
        cls = STAGES[kind]
        shared: set[str] = set(Training.model_fields) if issubclass(cls, Training) else set()
        body = _fields(cls, chosen, {"kind", *((shared & explained) - chosen.keys())})
        if shared & explained:
            body.append("# and the training fields that are explained under finetune")
        explained |= shared
        doc = (cls.__doc__ or kind).strip().splitlines()[0]
        head = f"- {kind}:" if chosen else f"- {kind}: # with its defaults"
        block = [*_comment(doc), head, *textwrap.indent("\n".join(body), "    ").splitlines()]
        lines += [f"  {line}" for line in block]
    return lines


def _limits(limits: list[dict[str, Any]]) -> list[str]:
    lines = []
    for limit in limits:
        body = textwrap.indent("\n".join(_fields(Limit, limit)), "    ").splitlines()
        lines += ["  -", *body]
    return lines


def _fields(model: type[BaseModel], chosen: dict[str, Any], skip: set[str] | None = None) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if name not in (skip or set()):
            lines += [*_comment(field.description), _line(name, field, chosen)]
    return lines


def _line(name: str, field: Any, chosen: dict[str, Any]) -> str:
    """`name: value`, commented out where the value is the default."""
    if name in chosen:
        return f"{name}: {_inline(chosen[name])}"
    default = None if field.default is PydanticUndefined else field.default
    return f"# {name}: {_inline(to_jsonable_python(default))}"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", _WIDTH, initial_indent="# ", subsequent_indent="# ")
