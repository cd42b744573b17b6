"""One contract for every stage: a tiny model runs through it, is saved and loaded, and predicts the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentences
import tiny
from adapters import save_adapter
from exports import exported
from mergeable import save_mergeable_llama
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.checkpoints.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.checkpoints.model import Model
from compress.checkpoints.torch_model import TorchModel
from compress.data.dataset import Dataset
from compress.digests import digest_directory
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.pipeline.integrity import PROBES, Contract, Probe, probed, weigh
from compress.progress import SilentProgress
from compress.stage.stage import Context, Stage
from compress.stages import STAGES
from compress.tasks.registry import get_task

QUICK = {"epochs": 0.5, "batch_size": 16, "learning_rate": 1e-3}
RECOVERY = {"steps": 8, "batch_size": 4, "sequence_length": 24, "validation_windows": 6}
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "finetune": [QUICK, {**QUICK, "freeze_embeddings": True, "dropout": 0.0}],
    "distill": [
        {**QUICK, "student": {"layers": [1]}},
        {**QUICK, "student": {"layers": [0]}, "method": "distilbert", "use_unlabeled": True, "labels_weight": 0.5},
        {**QUICK, "student": {"config": {"hidden_size": 16}}, "method": "tinybert"},
        {**QUICK, "teacher": "finetune", "method": "minilm"},
    ],
    "prune": [
        {"heads": 0.5, "feed_forward": 0.25},
        {"layers": 1},
        {"heads": 0.25, "importance": "magnitude"},
        {"sparsity": 0.5},
        {**QUICK, "sparsity": 0.5, "schedule": "cubic", "scope": "global"},
    ],
    "trim_vocabulary": [{}, {"characters": "seen", "use_unlabeled": True, "trim_positions": False}],
    "export": [{}],
    "qat": [{**QUICK, "calibration_examples": 16}],
    "quantize": [
        {},
        {"embedding_bits": 4},
        {"embedding_bits": 32, "per_channel": False, "reduce_range": True},
        {"method": "static", "calibration_examples": 24},
        {"method": "static", "calibration_method": "mse", "smooth_quant": 0.5, "format": "qdq", "types": "u8u8"},
        {"accuracy_floor": 0.5},
    ],
    "cast": [{}],
    "reduce_dimensions": [{"dimensions": 8}, {"dimensions": 24, "examples": 40}],
    "quantize_weights": [{}, {"bits": 8, "block_size": 64, "symmetric": False}],
    "equalize": [{}, {"strength": 1.0}],
    "gptq": [
        {"samples": 4, "sequence_length": 24, "group_size": 32},
        {"samples": 4, "sequence_length": 24, "embedding_bits": 4, "target_bits": 4.4, "group_size": 32},
        {"method": "rtn", "bits": 3, "sym": False, "embedding_bits": 8},
    ],
    "nncf_weights": [
        {"samples": 4, "sequence_length": 24, "group_size": 32},
        {"mode": "int4_asym", "samples": 4, "sequence_length": 24, "group_size": 32, "backup_mode": "none"},
    ],
    "gguf": [{}, {"float_type": "f32"}],
    "ort": [{}],
    "litert": [{"lengths": [24]}],
    "openvino": [{"embedding_bits": 4}, {"precision": "fp16"}, {"precision": "fp32"}],
    "executorch": [{}],
    "coreml": [{"embedding_bits": 4}],
    "tune_scales": [RECOVERY, {**RECOVERY, "norms": False, "precision": "fp32"}],
    "lora": [{**RECOVERY, "rank": 2, "learning_rate": 1e-2}],
    "merge_lora": [{"adapter": "adapter"}],
    "attach_lora": [{"adapter": "adapter"}],
}
TRACING = ("export", "qat", "openvino", "litert", "executorch", "coreml")
"""Stages that take seconds for each layer."""
COMPARED = ("export", "openvino", "executorch", "coreml")
"""Those whose bytes the formats' own tests compare."""
LANGUAGE = "text-generation"
EMBEDDINGS = "feature-extraction"
CASES = [
    pytest.param(kind, parameters, id=f"{kind}-{index}")
    for kind, cases in PARAMETERS.items()
    for index, parameters in enumerate(cases)
]


def test_every_stage_is_held_to_the_contract():
    assert set(PARAMETERS) == set(STAGES)


def stage_of(kind: str, parameters: dict[str, Any]) -> Stage[Any, Any]:
    return STAGES[kind].model_validate({"kind": kind, **parameters})


def task_of(stage: Stage[Any, Any]) -> str:
    """The toy task, unless the stage is for another alone."""
    return next(task for task in (tiny.TASK, LANGUAGE, EMBEDDINGS) if stage.is_for(get_task(task).capabilities))


def make_input(stage: Stage[Any, Any], folder: Path) -> TorchModel | Checkpoint | OnnxModel:
    """What the stage takes: a tiny encoder or its graph, or a tiny decoder made in ``folder``."""
    if stage.takes() is OnnxModel:
        made = exported()
        return OnnxModel(made.graph(), FLOAT_GRAPH, made.model.companions())
    if task_of(stage) == EMBEDDINGS:
        return sentences.encoder()
    if task_of(stage) != LANGUAGE:
        return tiny.encoder(num_hidden_layers=1) if stage.kind in TRACING else tiny.encoder()
    if stage.kind == "gguf":
        return save_mergeable_llama(folder / "decoder")
    source = save_tiny_llama(folder / "decoder")
    if stage.takes() is QuantizedCheckpoint:
        return quantize_tiny_llama(source, folder / "quantized decoder")
    return TorchModel.load(source.folder, get_task(LANGUAGE)) if stage.takes() is TorchModel else source


def make_context(stage: Stage[Any, Any], folder: Path) -> Context:
    if task_of(stage) == LANGUAGE:
        return replace(language_context(folder), locate=lambda name: make_adapter(stage, folder / name))
    if task_of(stage) == EMBEDDINGS:
        return sentences.context(sentences.dataset(train=48, validation=16, test=PROBES))
    data = tiny.dataset(train=64, validation=16, unlabeled=24)
    made = tiny.context(data, earlier=lambda label: tiny.encoder(seed=5))
    return replace(made, locate=lambda name: make_adapter(stage, folder / name))


def make_adapter(stage: Stage[Any, Any], folder: Path) -> Path:
    """An adapter for what `make_input` gives."""
    if task_of(stage) != LANGUAGE:
        return save_adapter(tiny.encoder().module, folder, "query")
    module = TorchModel.load(save_tiny_llama(folder.with_name("to adapt")).folder, get_task(LANGUAGE)).module
    return save_adapter(module, folder, "q_proj", "down_proj")


def language_context(folder: Path) -> Context:
    """Texts of the toy task, read letter by letter; the teacher is the decoder that was quantized."""

    def earlier(label: str) -> TorchModel:
        return TorchModel.load(save_tiny_llama(folder / "earlier").folder, get_task(LANGUAGE))

    task = get_task(LANGUAGE)
    counts = {"train": 64, "validation": 16, "test": PROBES}
    tables = {name: tiny.table(count, seed).select(["text"]) for seed, (name, count) in enumerate(counts.items())}
    data = Dataset(task.columns, tables, ())
    return Context(task, data, 24, 0, SilentProgress(), earlier, Path, folder / "scratch")


class Watched:
    """A dataset that remembers what was read of it."""

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
    """A stage's output, where it was saved, and the splits that the stage read."""

    output: Model
    folder: Path
    read: set[str]


def run(stage: Stage[Any, Any], folder: Path) -> Ran:
    """Run ``stage`` and save its output into the new ``folder``; beside it lies what it was made of."""
    beside = folder.with_name(f"{folder.name} work")
    context = make_context(stage, beside)
    data = Watched(context.data)
    output: Model = stage.run(make_input(stage, beside), replace(context, data=data))  # type: ignore[arg-type]
    folder.mkdir()
    output.save(folder)
    return Ran(output, folder, data.read)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Ran]:
    """Runs a stage at the first call with its parameters: that takes seconds, and three tests look at what it did."""
    done: dict[str, Ran] = {}

    def ran(kind: str, parameters: dict[str, Any]) -> Ran:
        key = f"{kind} {parameters}"
        if key not in done:
            done[key] = run(stage_of(kind, parameters), tmp_path_factory.mktemp(kind) / "once")
        return done[key]

    return ran


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_output_loads_again_predicts_the_same_and_keeps_the_contract(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran], tmp_path: Path
):
    stage = stage_of(kind, parameters)
    before = make_input(stage, tmp_path)
    (tmp_path / "before").mkdir()
    before.save(tmp_path / "before")
    output, after = once(kind, parameters).output, once(kind, parameters).folder
    assert type(output) is stage.gives() and isinstance(output, Model)

    context = make_context(stage, tmp_path)
    rows = context.data.split("test")
    assert len(rows) == PROBES
    probe = Probe(
        load=lambda folder: stage.gives().load(folder, get_task(task_of(stage))),
        encode=lambda processor: context.task.encode(rows, processor, None, context.max_length),
    )
    if probed(output).unavailable_reason() is None:
        outputs, reloaded = probe.in_memory(output), probe.from_disk(after)
        assert task_of(stage) != tiny.TASK or outputs.shape == (len(rows), 2)
        assert np.ptp(outputs, axis=0).min() > 0
        np.testing.assert_allclose(reloaded, outputs, atol=1e-6)
    else:
        # Core ML answers on a Mac only, and nothing else may be silent here.
        assert kind == "coreml" and stage.gives().load(after, get_task(task_of(stage))) == output

    contract = Contract(kind, stage.promise())
    contract.check(output, probed(before).digests(), weigh(tmp_path / "before"), after, probe)
    assert ("tensors changed" in dict(contract.found)) is stage.promise().changes_weights


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [case for case in CASES if case.values[0] not in COMPARED],
)
def test_a_stage_gives_the_same_files_each_time(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran], tmp_path: Path
):
    twice = run(stage_of(kind, parameters), tmp_path / "twice")
    assert digest_directory(once(kind, parameters).folder) == digest_directory(twice.folder)


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_what_a_stage_reads_is_what_it_declares(
    kind: str, parameters: dict[str, Any], once: Callable[[str, dict[str, Any]], Ran]
):
    # The cache key counts only the declared splits; a stage that read others would be kept when they change.
    needs = stage_of(kind, parameters).needs()
    read = once(kind, parameters).read
    allowed = {*needs.splits, "validation", *(["unlabeled"] if needs.unlabeled else [])}
    assert set(needs.splits) <= read <= allowed and "test" not in read
