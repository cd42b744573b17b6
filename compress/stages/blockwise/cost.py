"""Cost of quantizing a decoder block by block: arithmetic, peak memory and the size of the checkpoint."""

from __future__ import annotations

from dataclasses import replace

from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, handling, predicted
from compress.stages.gptq.settings import FLOAT_BITS, BlockTraining, Quantization

_ACTIVATION_BYTES = 1 << 30
"""As in `compress.stages.blockwise.calibration`, which imports torch."""
STATES_BYTES = 1 << 28
_WIDE_TENSORS = 4
_SQUARES = 4
"""The widest Hessian, its permuted copies and its factor."""
_SIDES_SHARED, _SIDES_APART = 3, 6
"""Hessians as wide as the model for each block: of what enters the attention, what leaves it, and what enters the
feed-forward part; and where tokens count otherwise for each layer, of query, key, value, output, gate and up."""
SHARD_BYTES = 500_000_000
"""As in `compress.models.safetensors_file`."""
_LOGITS_HELD = 3
"""The answers to a window, their likelihoods, and the squares of those."""


_HELD_IN_TRAINING = 32
"""Bytes of each weight of a block: steps, weight, integers, both gradients, AdamW's moments, and the best integers."""
_PASSES_OF_TRAINING = 3
"""Forwards and backwards, in passes forwards."""
_PASSES_BESIDE = 2
"""Of the float block, and of the trained one."""
_TENSORS_OF_TRAINING = 12
"""As wide as a block's widest layer, kept of a batch for the way back."""


def block_training_prediction(
    config: Quantization, training: BlockTraining, before: Shape | None, plan: PlanContext
) -> Prediction:
    """Return the cost of GPTQ with a training of each block.

    Args:
        config: Settings of the quantization.
        training: Settings of the blocks' training.
        before: Shape of the stage's input.
        plan: Data sizes and speed of the machine.
    """
    prediction = gptq_prediction(config, before, plan)
    if before is None or prediction.peak_memory_bytes.value is None:
        return prediction
    blocks, tokens = before.attention + before.feed_forward, config.samples * config.sequence_length
    passes = training.epochs * _PASSES_OF_TRAINING + _PASSES_BESIDE
    flops = quantization_flops(config, before) + 2 * blocks * tokens * passes
    activations = (
        _TENSORS_OF_TRAINING * training.batch_size * config.sequence_length * max(before.hidden, before.intermediate)
    )
    held = _HELD_IN_TRAINING * blocks / max(before.layers, 1) + 4 * activations
    note = "one block with its optimizer and a batch's activations, or what rounding needs; without torch itself"
    memory = Estimate(value=round(max(prediction.peak_memory_bytes.value, held)), note=note)
    return replace(prediction, seconds=plan.seconds(flops), peak_memory_bytes=memory)


def gptq_prediction(config: Quantization, before: Shape | None, plan: PlanContext) -> Prediction:
    """Return the cost of GPTQ, which holds one block in memory at a time."""
    if config.method == "rtn":
        seconds = handling(before)
    elif before is None:
        seconds = Estimate.unknown(SIZE_UNKNOWN)
    else:
        seconds = plan.seconds(quantization_flops(config, before))
    memory = None
    if before is not None:
        note = "one block in fp32, its largest Hessian four times, activations, or logits; without torch itself"
        memory = Estimate(value=round(quantization_memory_bytes(config, before)), note=note)
    return predicted(before, packed(config, before), seconds, memory)


def packed(config: Quantization, shape: Shape | None) -> Shape | None:
    """Return the shape of the GPTQ checkpoint made from a model."""
    if shape is None:
        return None
    bits = _table_bits(config, shape)
    return replace(
        shape.in_bits(config.bits, bits if bits < FLOAT_BITS else 32),
        packed_bytes=round(checkpoint_bytes(config, shape)),
    )


def quantization_flops(config: Quantization, shape: Shape) -> float:
    """Return the multiplications and additions of all passes, Hessians and the solver; 0 for rounding to nearest.

    ``guided`` passes the blocks forwards, then each of them forwards and backwards, and the head both ways.
    """
    if config.method == "rtn":
        return 0.0
    tokens = config.samples * config.sequence_length
    blocks = shape.attention + shape.feed_forward
    forward = 2 * blocks * tokens
    # One triangle of each Hessian is multiplied out.
    sides = _SIDES_APART if config.guided else _SIDES_SHARED
    hessians = tokens * shape.layers * (sides * shape.hidden**2 + shape.intermediate**2)
    # Each layer's weights are multiplied by a square as wide as its inputs.
    inward, outward = shape.feed_forward * 2 / 3, shape.feed_forward / 3
    solver = 2 * ((shape.attention + inward) * shape.hidden + outward * shape.intermediate)
    gradients = (3 * forward + 4 * shape.embeddings * tokens) if config.guided else 0.0
    return forward + gradients + hessians + solver


def quantization_memory_bytes(config: Quantization, shape: Shape) -> float:
    """Return the peak memory: a block in float32, the widest Hessian with the solver's copies, and activations.

    Or, where tokens are weighed, the answers to one window.
    """
    block = 4 * (shape.attention + shape.feed_forward) / max(shape.layers, 1)
    widest = max(shape.hidden, shape.intermediate)
    if config.method == "rtn":
        return 2 * block
    tokens = config.samples * config.sequence_length
    activations = min(4 * _WIDE_TENSORS * tokens * widest, _ACTIVATION_BYTES)
    states = 2 * min(4 * tokens * shape.hidden, STATES_BYTES)
    solving = block + 4 * _SQUARES * widest**2 + activations
    vocabulary = shape.embeddings / max(shape.hidden, 1)
    weighing = 4 * _LOGITS_HELD * config.sequence_length * vocabulary if config.guided else 0.0
    return max(solving, weighing) + states


def checkpoint_bytes(config: Quantization, shape: Shape) -> float:
    """Return the size of a GPTQ checkpoint: packed layers, float16 tables and, if quantized, their integers."""
    size = shape.hidden if config.group_size == -1 else config.group_size
    bits = config.target_bits or config.bits
    packed = (shape.attention + shape.feed_forward) * (bits + (16 + bits) / max(size, 1)) / 8
    tables = 0.0
    if (table_bits := _table_bits(config, shape)) < FLOAT_BITS:
        tables = shape.embeddings * (table_bits + 16 / config.embedding_group_size) / 8
    return packed + 2 * (shape.embeddings + shape.other) + tables + shape.processor_bytes


def _table_bits(config: Quantization, shape: Shape) -> int:
    """Return the bits of the tables; float16 where a budget chooses them."""
    others = shape.parameters - shape.embeddings
    return FLOAT_BITS if config.chooses_tables else config.table_bits(shape.embeddings, others)
