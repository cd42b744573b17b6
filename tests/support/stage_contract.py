"""The contract of every stage, checked on a tiny model: its saved output loads again and has the same predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sentences
import tiny
from adapters import save_adapter
from exports import exported
from mergeable import save_mergeable_llama
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.data.dataset import Dataset
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.model import Model, TorchModel
from compress.pipeline.integrity import PROBE_ROWS, IntegrityCheck, PredictionProbe, inspector_of, measure_size
from compress.stages.base import Context, Stage
from compress.stages.registry import STAGES
from compress.tasks.registry import TASKS
from compress.utils.progress import SilentProgress

TRACING = ("onnx", "qat", "openvino", "litert", "executorch", "coreml")
"""Stages that take seconds per layer."""
LANGUAGE = "text-generation"
EMBEDDINGS = "feature-extraction"


def stage_of(kind: str, parameters: dict[str, Any]) -> Stage[Any, Any]:
    return STAGES[kind].model_validate({"kind": kind, **parameters})


def task_of(stage: Stage[Any, Any]) -> str:
    """Return text classification, or the one task that the stage supports instead."""
    return next(task for task in (tiny.TASK, LANGUAGE, EMBEDDINGS) if stage.supports(TASKS[task].capabilities))


def make_input(stage: Stage[Any, Any], folder: Path) -> TorchModel | Checkpoint | OnnxModel:
    """Return a valid input of the stage: a tiny encoder, its ONNX graph, or a tiny decoder saved in ``folder``."""
    if stage.input_type is OnnxModel:
        exported_model = exported()
        return OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())
    if task_of(stage) == EMBEDDINGS:
        return sentences.encoder()
    if task_of(stage) != LANGUAGE:
        return tiny.encoder(num_hidden_layers=1) if stage.kind in TRACING else tiny.encoder()
    if stage.kind == "gguf":
        return save_mergeable_llama(folder / "decoder")
    source = save_tiny_llama(folder / "decoder")
    if stage.input_type is QuantizedCheckpoint:
        return quantize_tiny_llama(source, folder / "quantized decoder")
    return TorchModel.load(source.folder, TASKS[LANGUAGE]) if stage.input_type is TorchModel else source


def make_context(stage: Stage[Any, Any], folder: Path) -> Context:
    if task_of(stage) == LANGUAGE:
        return replace(language_context(folder), locate=lambda name: make_adapter(stage, folder / name))
    if task_of(stage) == EMBEDDINGS:
        return sentences.context(sentences.dataset(train=48, validation=16, test=PROBE_ROWS))
    data = tiny.dataset(train=64, validation=16, unlabeled=24)
    stage_context = tiny.context(data, earlier=lambda label: tiny.encoder(seed=5))
    return replace(stage_context, locate=lambda name: make_adapter(stage, folder / name))


def make_adapter(stage: Stage[Any, Any], folder: Path) -> Path:
    """Save an adapter for the model that `make_input` returns."""
    if task_of(stage) != LANGUAGE:
        return save_adapter(tiny.encoder().module, folder, "query")
    module = TorchModel.load(save_tiny_llama(folder.with_name("to adapt")).folder, TASKS[LANGUAGE]).module
    return save_adapter(module, folder, "q_proj", "down_proj")


def language_context(folder: Path) -> Context:
    """Return a context with texts of the toy task, one token per letter; the teacher is the unquantized decoder."""

    def earlier(label: str) -> TorchModel:
        return TorchModel.load(save_tiny_llama(folder / "earlier").folder, TASKS[LANGUAGE])

    task = TASKS[LANGUAGE]
    counts = {"train": 64, "validation": 16, "test": PROBE_ROWS}
    tables = {name: tiny.table(count, seed).select(["text"]) for seed, (name, count) in enumerate(counts.items())}
    data = Dataset(task.columns, tables, ())
    return Context(task, data, 24, 0, SilentProgress(), earlier, Path, folder / "scratch")


class Watched:
    """A dataset that records which splits were read."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self.read: set[str] = set()
        self.splits = data.splits

    def split(self, name: str) -> pa.Table:
        self.read.add(name)
        return self._data.split(name)

    @property
    def unlabeled(self) -> pa.Table | None:
        self.read.add("unlabeled")
        return self._data.unlabeled


@dataclass(frozen=True)
class Ran:
    """A stage's output, the folder it was saved in, and the splits that the stage read."""

    output: Model
    folder: Path
    read: set[str]


def run(stage: Stage[Any, Any], folder: Path) -> Ran:
    """Run ``stage`` and save its output into the new ``folder``; its inputs go into a folder beside it."""
    beside = folder.with_name(f"{folder.name} work")
    context = make_context(stage, beside)
    data = Watched(context.data)
    output: Model = stage.run(make_input(stage, beside), replace(context, data=data))  # type: ignore[arg-type]
    folder.mkdir()
    output.save(folder)
    return Ran(output, folder, data.read)


def check_contract(stage: Stage[Any, Any], ran: Ran, folder: Path) -> None:
    """Check that the saved output loads with equal predictions and matches the stage's specification.

    ``folder`` is empty.
    """
    stage_input = make_input(stage, folder)
    (folder / "before").mkdir()
    stage_input.save(folder / "before")
    output, after = ran.output, ran.folder
    assert type(output) is stage.output_type and isinstance(output, Model)

    context = make_context(stage, folder)
    rows = context.data.split("test")
    assert len(rows) == PROBE_ROWS
    probe = PredictionProbe(
        load=lambda path: stage.output_type.load(path, TASKS[task_of(stage)]),
        encode=lambda processor: context.task.encode(rows, processor, None, context.max_length),
    )
    if inspector_of(output).unavailable_reason() is None:
        outputs, reloaded = probe.in_memory(output), probe.from_disk(after)
        assert task_of(stage) != tiny.TASK or outputs.shape == (len(rows), 2)
        assert np.ptp(outputs, axis=0).min() > 0
        np.testing.assert_allclose(reloaded, outputs, atol=1e-6)
    else:
        # Core ML runs on macOS only; every other format must be able to predict here.
        assert stage.kind == "coreml" and stage.output_type.load(after, TASKS[task_of(stage)]) == output

    integrity = IntegrityCheck(stage.kind, stage.output_spec())
    integrity.check(output, inspector_of(stage_input).digests(), measure_size(folder / "before"), after, probe)
    assert ("tensors changed" in dict(integrity.findings)) is stage.output_spec().changes_weights


def check_reads(stage: Stage[Any, Any], ran: Ran) -> None:
    """Check that a stage reads only its declared splits.

    The cache key covers only these, so a change of another split would not invalidate the cached output.
    """
    needs = stage.needs()
    allowed = {*needs.splits, "validation", *(["unlabeled"] if needs.unlabeled else [])}
    assert set(needs.splits) <= ran.read <= allowed and "test" not in ran.read
