"""Set the smallest weights to zero, at once or while training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.models.torch_model import TorchModel
from compress.numerics.pruning import cubic_sparsity, magnitude_masks
from compress.training.loop import Trainee, forward, train
from compress.training.sparsity import linear_layers

if TYPE_CHECKING:
    from compress.stages.prune import Prune
    from compress.stages.stage import Context

_UPDATES = 100
_FINAL_SPARSITY_AT = 0.7
"""Share of the steps after which sparsity stands still, so that the last steps recover quality."""


def prune(model: TorchModel, stage: Prune, context: Context) -> None:
    """Prune the linear weights of ``model`` in place; the classifier's head stays dense."""
    assert stage.sparsity is not None
    layers = linear_layers(model.module)
    weights = [layer.weight for layer in layers]
    if stage.schedule == "one-shot":
        _zero(weights, magnitude_masks(weights, stage.sparsity, stage.scope))
        return
    final, scope = stage.sparsity, stage.scope
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]

    def after_step(step: int, steps: int) -> None:
        rising = max(1, round(steps * _FINAL_SPARSITY_AT))
        every = max(1, rising // _UPDATES)
        if step == rising or (step < rising and step % every == 0):
            masks[:] = magnitude_masks(weights, cubic_sparsity(step, rising, final), scope)
        _zero(weights, masks)

    trainee = Trainee(
        model.module,
        context.encode("train", model),
        loss=lambda module, batch: context.task.loss(forward(module, batch), batch["labels"]),
        after_step=after_step,
        validate=context.validator(model),
    )
    # An earlier epoch is less sparse, so the last one is kept whatever the validation split says.
    train(trainee, stage.model_copy(update={"keep_best": False}), context.seed, context.progress, "prune")


@torch.no_grad()
def _zero(weights: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)
