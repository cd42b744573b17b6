"""Settings of structured pruning of language models. Importing this imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH
from compress.stages.blockwise.cost import SHARD_BYTES, quantization_flops, quantization_memory_bytes
from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, handling, predicted
from compress.stages.gptq.settings import Quantization
from compress.stages.sparsify.settings import DecoderSparsity
from compress.stages.training.settings import PRECISION, Precision
from compress.utils.pydantic_models import Frozen, changed_fields


class DecoderPruning(Frozen):
    """Settings that say which layers, heads, neurons and experts of a language model are removed."""

    layers: int = Field(0, ge=0, description="number of whole layers to remove")
    heads: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of attention head groups to remove in each layer, with their keys and values",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75]},
    )
    feed_forward: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of feed-forward neurons to remove in each layer",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75, 0.875]},
    )
    experts: float = Field(
        0.0, ge=0, lt=1, description="share of experts to remove in each layer, those that the router selects least"
    )
    multiple: int = Field(
        64,
        ge=1,
        le=1024,
        description="number that remaining widths of feed-forward and attention layers are a multiple of, as low-bit "
        "groups require",
    )
    samples: int = Field(
        16, ge=1, le=100_000, description="sequences of text from the train split for importance scores"
    )
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")
    damp_percent: float = Field(0.01, gt=0, lt=1, description="added to the diagonal of Hessians, relative to its mean")
    precision: Precision = PRECISION

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if not (self.layers or self.removes_width):
            raise ValueError("some of layers, heads, feed_forward and experts")
        if not (self.heads or self.feed_forward) and changed_fields(self, ["multiple"]):
            raise ValueError("heads or feed_forward, which multiple concerns")
        return self

    @property
    def removes_width(self) -> bool:
        """Return whether parts of layers are removed."""
        return bool(self.heads or self.feed_forward or self.experts)


def calibration_settings(settings: DecoderPruning | DecoderSparsity) -> Quantization:
    """Return how a stage reads its text, as settings of the quantizer that passes blocks in the same way."""
    return Quantization(
        guided=False, samples=settings.samples, sequence_length=settings.sequence_length, precision=settings.precision
    )


def decoder_pruning_prediction(
    settings: DecoderPruning, before: Shape | None, after: Shape | None, plan: PlanContext
) -> Prediction:
    """Return the cost of pruning: passes over the text, one block in memory, and a shard of the files being written.

    Args:
        settings: fields of the stage.
        before: shape of the input.
        after: shape of the output.
        plan: sizes of the data, and the speed of this machine.
    """
    if before is None:
        return predicted(None, None, Estimate.unknown(SIZE_UNKNOWN))
    # The Hessian that is solved on, the one that judges, their sum, and its factor.
    fitted = 16 * before.intermediate**2 if settings.layers else 0
    solving = quantization_memory_bytes(calibration_settings(settings), before)
    return _prediction(pruning_flops(settings, before), max(solving, fitted), before, after, plan)


def decoder_sparsity_prediction(settings: DecoderSparsity, before: Shape | None, plan: PlanContext) -> Prediction:
    """Return the cost of unstructured pruning: one pass over the text, unless magnitudes alone decide."""
    if before is None:
        return predicted(None, None, Estimate.unknown(SIZE_UNKNOWN))
    text = calibration_settings(settings)
    if settings.method == "magnitude":
        text = text.model_copy(update={"method": "rtn"})
    return _prediction(quantization_flops(text, before), quantization_memory_bytes(text, before), before, before, plan)


def _prediction(flops: float, held_bytes: float, before: Shape, after: Shape | None, plan: PlanContext) -> Prediction:
    shard = min(SHARD_BYTES, 4 * before.parameters)
    seconds = plan.seconds(flops) if flops else handling(before)
    note = "a block in fp32, its Hessian, activations, and a shard; without torch itself"
    return predicted(before, after, seconds, Estimate(value=round(max(held_bytes, shard) + shard), note=note))


def pruning_flops(settings: DecoderPruning, shape: Shape) -> float:
    """Return the multiplications and additions of pruning on calibration text.

    The text passes once for whole blocks and once for their parts, and once more for each kind of part, and for whole
    blocks, for which the others compensate.
    """
    tokens, blocks = settings.samples * settings.sequence_length, shape.attention + shape.feed_forward
    total = 0.0
    if settings.removes_width:
        total += 2 * blocks * tokens
    for share, columns in ((settings.heads, shape.hidden), (settings.feed_forward, shape.intermediate)):
        # Another pass, the Hessian of the layer's inputs, and the removal of parts from it.
        solved = columns**2 * tokens + 2 * share * columns**2 * (shape.hidden + columns)
        total += (2 * blocks * tokens + shape.layers * solved) if share else 0.0
    if settings.layers:
        total += 2 * (blocks + shape.intermediate**2) * tokens + 2 * blocks * tokens
    return total
