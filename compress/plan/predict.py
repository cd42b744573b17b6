"""Time, memory and disk of each stage, from parameter counts and text sizes: all of it estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compress.environment import cores_quota, granted_cores
from compress.formats.onnx.stage import Export
from compress.plan.contents import Estimate
from compress.plan.data_size import Text
from compress.plan.quantization import checkpoint_bytes, quantization_flops, quantization_memory_bytes
from compress.plan.shape import Shape, pruned_shape, student_shape
from compress.quantization.config import Quantization
from compress.recipe.recipe import Recipe
from compress.stage.stage import Stage
from compress.stages.attach_lora import AttachLora
from compress.stages.cast import Cast
from compress.stages.distill import Distill, Student
from compress.stages.equalize import Equalize
from compress.stages.finetune import Finetune
from compress.stages.gptq import Gptq
from compress.stages.lora import Lora
from compress.stages.merge_lora import MergeLora
from compress.stages.nncf_weights import NncfWeights
from compress.stages.prune import Prune
from compress.stages.qat import Qat
from compress.stages.quantize import Quantize
from compress.stages.quantize_weights import QuantizeWeights
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.stages.trim_vocabulary import TrimVocabulary
from compress.stages.tune_scales import TuneScales
from compress.tasks.registry import get_task
from compress.training.recovery_config import Recovery

FLOPS_FORWARD = 2
"""A multiplication and an addition for each parameter and token (Kaplan et al. 2020, section 2.1)."""
FLOPS_TRAINING = 6
"""Forward and backward (ibid.)."""
TRAINING_BYTES = 16
"""For each parameter in fp32: the weight, its gradient and AdamW's two moments."""

AnyStage = Stage[Any, Any]
_TRAINS = (Finetune, Distill, Prune, Qat)
_OF_CHECKPOINTS = (TuneScales, Lora, AttachLora)
_KEEP_SHAPE = (
    *(Finetune, TrimVocabulary, ReduceDimensions, Export, Quantize, QuantizeWeights, Cast, Equalize, Gptq),
    *(NncfWeights, MergeLora, Qat, *_OF_CHECKPOINTS),
)


@dataclass(frozen=True)
class Prediction:
    """What one stage costs, and the shape of what it gives (``None`` if that cannot be told)."""

    shape: Shape | None
    seconds: Estimate
    peak_memory_bytes: Estimate
    disk_bytes: Estimate


@dataclass
class Predictor:
    """Follows the model's shape through the stages; ``shapes`` has each label's output and `start`."""

    recipe: Recipe
    texts: dict[str, Text]
    find_shape: Callable[[Student], Shape | None]
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    weight_bits: tuple[int, int] = (32, 32)
    rate: float | None = None
    quantized_by: Quantization | None = None

    def predict(self, stage: AnyStage, label: str, before: Shape | None, cached: bool | None) -> Prediction:
        """Predict one stage from its input's shape; call in the recipe's order. Raises `ModelError`."""
        after = self._output(stage, before)
        self.shapes[label] = after
        if isinstance(stage, Quantize) and stage.part == "all":
            self.weight_bits = (8, stage.embedding_bits)
        if isinstance(stage, QuantizeWeights) and stage.part == "all":
            self.weight_bits = (stage.bits, stage.bits)
        if isinstance(stage, Cast):
            self.weight_bits = (16, 16)
        if isinstance(stage, Qat):
            self.weight_bits = (stage.bits, 32)
        quantization = _quantization(stage)
        if quantization is not None:
            tables = (quantization.embedding_bits if quantization.integer_tables else None) or 32
            self.weight_bits = (quantization.bits, tables)
            self.quantized_by = quantization
        disk = self._disk(stage, after)
        if cached:
            nothing = Estimate(value=0, note="cached")
            return Prediction(after, nothing, nothing, disk)
        return Prediction(after, self._seconds(stage, before, after), self._memory(stage, before, after), disk)

    def _output(self, stage: AnyStage, before: Shape | None) -> Shape | None:
        if isinstance(stage, Distill) and stage.student and stage.student.model:
            return self.find_shape(stage.student)
        if before is None:
            return None
        if isinstance(stage, Distill):
            return student_shape(stage, before)
        if isinstance(stage, Prune):
            return pruned_shape(stage, before)
        return before if isinstance(stage, _KEEP_SHAPE) else None

    def _disk(self, stage: AnyStage, shape: Shape | None) -> Estimate:
        if shape is None:
            return _unknown("the size of its output is not known before it runs")
        quantization = self.quantized_by if isinstance(stage, _OF_CHECKPOINTS) else _quantization(stage)
        if quantization is not None:
            note = "packed layers, float16 tables with their integers beside them, and the processor's files"
            return Estimate(value=round(checkpoint_bytes(quantization, shape)), note=note)
        working, tables = self.weight_bits
        size = shape.working * working / 8 + shape.embeddings * tables / 8 + shape.processor_bytes
        note = f"{working}-bit matrices, {tables}-bit embeddings, and the processor's files"
        if isinstance(stage, TrimVocabulary):
            note = "at most: how many tokens go is known once the text has been counted"
        return Estimate(value=round(size), note=note)

    def _seconds(self, stage: AnyStage, before: Shape | None, after: Shape | None) -> Estimate:
        if isinstance(stage, Prune) and not stage.needs().splits:
            return _unknown("no pass over data; seconds rather than minutes")
        if isinstance(stage, Gptq):
            return self._quantization_seconds(stage, before)
        if isinstance(stage, Recovery):
            return self._recovery_seconds(stage, before)
        if not isinstance(stage, _TRAINS):
            return _unknown("not predicted: it does not train")
        if not self._reads_text():
            return _unknown("predicted for text only")
        if before is None or after is None:
            return _unknown("the size of the model is not known yet")
        train = self.texts.get("split train")
        if train is None:
            return _unknown("the training text is not here yet")
        flops = self._flops(stage, before, after, train)
        if flops is None:
            return _unknown("the unlabeled text or the teacher is not here yet")
        return self._at_this_rate(flops)

    def _reads_text(self) -> bool:
        return all(column.kind == "text" for column in get_task(self.recipe.task).columns)

    def _at_this_rate(self, flops: float) -> Estimate:
        if self.rate is None:
            self.rate = machine_flops_per_second()
        note = f"estimate: {flops:.2g} FLOPs at the {self.rate / 1e9:.0f} GFLOP/s of fp32 matrix products here"
        return Estimate(value=flops / self.rate, note=note)

    def _quantization_seconds(self, stage: Gptq, before: Shape | None) -> Estimate:
        if stage.method == "rtn":
            return _unknown("no pass over data; seconds rather than minutes")
        if before is None:
            return _unknown("the size of the model is not known yet")
        return self._at_this_rate(quantization_flops(stage, before))

    def _recovery_seconds(self, stage: Recovery, before: Shape | None) -> Estimate:
        """Pupil and teacher, each with its head, on every window; the pupil is judged twice, the teacher once."""
        if before is None:
            return _unknown("the size of the model is not known yet")
        judged = 3 * stage.validation_windows * FLOPS_FORWARD
        learned = stage.steps * stage.batch_size * (FLOPS_TRAINING + FLOPS_FORWARD)
        return self._at_this_rate((judged + learned) * stage.sequence_length * before.parameters)

    def _flops(self, stage: Finetune | Distill | Prune | Qat, before: Shape, after: Shape, train: Text) -> float | None:
        length = self.recipe.data.max_length
        tokens = float(train.tokens(length))
        if isinstance(stage, Prune) and stage.zeros is None:
            share = min(stage.importance_examples / train.rows, 1.0)
            return FLOPS_TRAINING * before.working * tokens * share
        if isinstance(stage, Distill):
            teacher = self.shapes.get(stage.teacher) if stage.teacher else before
            extra = [self.texts.get(f"unlabeled {name}") for name in self.recipe.data.unlabeled]
            if teacher is None or (stage.use_unlabeled and None in extra):
                return None
            if stage.use_unlabeled:
                tokens += sum(text.tokens(length) for text in extra if text)
            return (FLOPS_TRAINING * after.working + FLOPS_FORWARD * teacher.working) * tokens * stage.epochs
        taught = FLOPS_FORWARD * before.working * tokens if isinstance(stage, Qat) else 0.0
        return FLOPS_TRAINING * after.working * tokens * stage.epochs + taught

    def _memory(self, stage: AnyStage, before: Shape | None, after: Shape | None) -> Estimate:
        if before is None or after is None:
            return _unknown("the size of the model is not known yet")
        if isinstance(stage, TrimVocabulary):
            return Estimate(value=round(8 * before.parameters), note="the model before and after, in fp32")
        if isinstance(stage, Gptq):
            note = "one block in fp32, its largest Hessian four times, activations, or logits; without torch itself"
            return Estimate(value=round(quantization_memory_bytes(stage, before)), note=note)
        if isinstance(stage, NncfWeights):
            note = "at least: the whole model in fp32; without torch itself"
            return Estimate(value=round(4 * before.parameters), note=note)
        if not isinstance(stage, _TRAINS):
            return _unknown("not predicted: it depends on the tool that is called")
        if not self._reads_text():
            return _unknown("predicted for text only")
        trained = before if isinstance(stage, Prune) else after
        if not (trained.hidden and trained.heads):
            return _unknown("the config names no hidden_size and num_attention_heads")
        activations = activation_bytes(trained, stage.batch_size, self.recipe.data.max_length)
        teacher = (self.shapes.get(stage.teacher or "") or before) if isinstance(stage, Distill) else None
        held = TRAINING_BYTES * trained.parameters + (4 * teacher.parameters if teacher else 0)
        note = "at most: fp32 weights, gradients, moments, activations of a full batch; without torch itself"
        return Estimate(value=round(held + activations), note=note)


def _quantization(stage: AnyStage) -> Quantization | None:
    if isinstance(stage, NncfWeights):
        return stage.equivalent
    return stage if isinstance(stage, Gptq) else None


def activation_bytes(shape: Shape, batch: int, length: int) -> float:
    """Activations kept for the backward pass, in fp32: twice the 16-bit sbh(34 + 5as/h) a layer.

    Korthikanti et al. 2022, equation 1.
    """
    per_layer = length * batch * shape.hidden * (34 + 5 * shape.heads * length / shape.hidden)
    return 2 * shape.layers * per_layer


def machine_flops_per_second(budget_seconds: float = 0.02) -> float:
    """The best rate of an fp32 matrix product on one core within ``budget_seconds``, times the cores granted.

    The matrices stay below the size from which OpenBLAS takes several threads, which stall each other where
    a container grants fewer cores than it shows.
    """
    import numpy as np

    size = 96
    left = np.full((size, size), 0.5, dtype=np.float32)
    best, end = float("inf"), time.perf_counter() + budget_seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(8):
            left @ left
        best = min(best, (time.perf_counter() - start) / 8)
    cores = min(len(granted_cores()), cores_quota() or float("inf"))
    return 2 * size**3 / best * max(cores, 1)


def _unknown(reason: str) -> Estimate:
    return Estimate(value=None, note=reason)
