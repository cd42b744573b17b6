"""Remove attention heads, feed-forward neurons, layers and channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from compress.models.model import TorchModel
from compress.stages.base import Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.protocols import field_search_values
from compress.stages.prune.settings import Pruning
from compress.stages.training.length import FLOPS_TRAINING, training_prediction
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, HAS_LABELS
from compress.utils.errors import ModelError


class Prune(Pruning, Stage[TorchModel, TorchModel]):
    """Structured pruning by importance measured on data; tensors get smaller.

    The first-order Taylor importance of each attention head and feed-forward neuron (Michel et al. 2019, section 4.1;
    Molchanov et al. 2019, section 3.1) is accumulated over training examples, and the least important ones are removed.
    In vision models, channels of convolutions are removed together with everything coupled to them (Fang et al. 2023,
    DepGraph, section 3): a share of each layer, or the least important ones up to a share of all FLOPs or parameters.
    """

    version = 4
    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    excludes = frozenset({EXPORTED_FROM_CHECKPOINT})
    required_data = Requirements(splits=("train",))
    kind: Literal["prune"] = "prune"

    def called_packages(self) -> tuple[str, ...]:
        """Return the distributions that the stage calls, with Torch-Pruning if channels are removed."""
        return (*self.packages, "torch-pruning") if self.removes_channels else self.packages

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of one pass over the examples, forwards and backwards.

        Raises `ModelError` if no layer or head would be left.
        """

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            share = min(self.importance_examples / plan.splits["train"].rows, 1.0)
            return FLOPS_TRAINING * before.working * tokens * share

        after = None
        if before is not None and not self.removes_channels:
            after = pruned_shape(before, self.layers, self.heads, self.feed_forward)
        return training_prediction(_BATCH, before, after, plan, flops, trained=before)

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return values for heads and neurons in transformers, and for FLOPs in convolutional networks.

        If layers are removed, half as many and half as many again are tried too.
        """
        channels = self.removes_channels if before is None else not before.attention
        values = field_search_values(self, timed).items()
        chosen = {name: tried for name, tried in values if (name == "flops") == channels}
        return chosen | layer_counts(self.layers, before)

    def check_model(self, start: Path) -> None:
        """Raise `StageError` for an architecture whose heads, neurons or layers cannot be removed."""
        if self.layers or self.heads or self.feed_forward:
            from compress.models.prune_dry_run import check_prunable

            check_prunable(start, layers=self.layers > 0, heads=self.heads, neurons=self.feed_forward)

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel | None:
        """Return the model with any heads, neurons and layers removed; None for channels, whose number data decide."""
        if self.removes_channels:
            return None
        from compress.models.prune_dry_run import prune_last_parts

        prune_last_parts(model.module, self.layers, self.heads, self.feed_forward)
        return model

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Prune ``model`` in place."""
        from compress.stages.prune.structured import prune

        prune(model, self, context)
        return model


_BATCH = 32
"""Examples of a batch that importance is measured on."""


def pruned_shape(shape: Shape, layers: int, heads: float, feed_forward: float, experts: float = 0.0) -> Shape:
    """Return the shape of a transformer after pruning. Raises `ModelError` if no layer or head would be left.

    Args:
        shape: shape before pruning.
        layers: number of layers that are removed.
        heads: share of attention heads that are removed in each layer.
        feed_forward: share of feed-forward neurons that are removed in each layer.
        experts: share of experts that are removed in each mixture.
    """
    if layers and layers >= shape.layers > 0:
        raise ModelError(
            f"Pruning removes {layers} layers of a model that has {shape.layers}.",
            expected=f"at most {shape.layers - 1}",
        )
    if shape.heads and round(shape.heads * (1 - heads)) < 1:
        raise ModelError(
            f"Pruning removes {heads:.0%} of {shape.heads} heads, which leaves none.", expected="a smaller share"
        )
    shorter = shape.with_layers(shape.layers - layers)
    return replace(
        shorter,
        attention=shorter.attention * (1 - heads),
        feed_forward=shorter.feed_forward * (1 - feed_forward) * (1 - experts),
        intermediate=round(shorter.intermediate * (1 - feed_forward)),
    )


def layer_counts(layers: int, before: Shape | None) -> dict[str, tuple[Any, ...]]:
    """Return numbers of layers to remove that a search should try, under the field's name, if layers are removed."""
    if not layers or before is None:
        return {}
    counts = (count for count in (layers // 2, layers, 3 * layers // 2) if count < before.layers)
    return {"layers": tuple(dict.fromkeys(counts))}
