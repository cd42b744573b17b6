"""What training costs, from parameter counts and text sizes."""

from __future__ import annotations

from collections.abc import Callable

from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, predicted

FLOPS_FORWARD = 2
"""A multiplication and an addition for each parameter and token (Kaplan et al. 2020, section 2.1)."""
FLOPS_TRAINING = 6
"""Forward and backward (ibid.)."""
TRAINING_BYTES = 16
"""For each parameter in fp32: the weight, its gradient and AdamW's two moments."""

KEPT_STATES_BYTES = 1 << 30
"""What frozen layers give to all examples is kept in memory up to that size; else each step computes it."""

Flops = Callable[[Shape, Shape, float], float | None]
"""Of a training by its input's shape, its output's, and the tokens of an epoch; ``None`` where data is missing."""


def training_prediction(
    batch_size: int,
    before: Shape | None,
    after: Shape | None,
    plan: PlanContext,
    flops: Flops,
    trained: Shape | None,
    teacher: Shape | None = None,
) -> Prediction:
    """Return the cost of training ``trained`` on the ``train`` split, with a ``teacher`` in memory if any."""
    seconds = _seconds(before, after, plan, flops)
    return predicted(before, after, seconds, _memory(batch_size, trained, teacher, plan))


def _seconds(before: Shape | None, after: Shape | None, plan: PlanContext, flops: Flops) -> Estimate:
    if not plan.reads_text and plan.uses is None:
        return Estimate.unknown("what an example costs is not known before it is tried")
    if before is None or after is None:
        return Estimate.unknown(SIZE_UNKNOWN)
    train = plan.splits.get("train")
    if train is None:
        return Estimate.unknown("the training text is not here yet")
    found = flops(before, after, plan.tokens(train))
    if found is None:
        return Estimate.unknown("the unlabeled text or the teacher is not here yet")
    return plan.seconds(found)


def _memory(batch_size: int, trained: Shape | None, teacher: Shape | None, plan: PlanContext) -> Estimate:
    if trained is None:
        return Estimate.unknown(SIZE_UNKNOWN)
    if not plan.reads_text:
        return Estimate.unknown("predicted for text only")
    if not (trained.hidden and trained.heads):
        return Estimate.unknown("the config names no hidden_size and num_attention_heads")
    activations = activation_bytes(trained, batch_size, plan.max_length)
    held = TRAINING_BYTES * trained.parameters + (4 * teacher.parameters if teacher else 0)
    note = "at most: fp32 weights, gradients, moments, activations of a full batch; without torch itself"
    return Estimate(value=round(held + activations), note=note)


def activation_bytes(shape: Shape, batch: int, length: int) -> float:
    """Activations kept for the backward pass, in fp32: twice the 16-bit sbh(34 + 5as/h) a layer.

    Korthikanti et al. 2022, equation 1.
    """
    per_layer = length * batch * shape.hidden * (34 + 5 * shape.heads * length / shape.hidden)
    return 2 * shape.layers * per_layer
