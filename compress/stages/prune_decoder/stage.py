"""Remove layers, heads, neurons and experts of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.protocols import field_search_values
from compress.stages.prune.stage import layer_counts, pruned_shape
from compress.stages.prune_decoder.settings import DecoderPruning, decoder_pruning_prediction
from compress.tasks.capability import GENERATES


class PruneDecoder(DecoderPruning, Stage[Checkpoint, Checkpoint]):
    """Structured pruning of a language model, read tensor by tensor with one block in memory at a time.

    Whole layers: the consecutive ones that change hidden states least (Gromov et al. 2024, figure 1); the layer before
    compensates (Shopkhoev et al. 2025, ReplaceMe). Head groups with keys and values, and neurons: those for which the
    others can compensate (Kurtic et al. 2023, ZipLM, section 3.1). Experts: those that the router selects least.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({GENERATES})
    uses_device = True
    required_data = Requirements(splits=("train",))
    kind: Literal["prune_decoder"] = "prune_decoder"

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of passes over the text. Raises `ModelError` if no layer or head would be left."""
        after = None
        if before is not None:
            after = pruned_shape(before, self.layers, self.heads, self.feed_forward, self.experts)
        return decoder_pruning_prediction(self, before, after, plan)

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return values for heads and neurons, and for layers if layers are removed."""
        return field_search_values(self, timed) | layer_counts(self.layers, before)

    def prune_widths(self, model: object) -> bool:
        """Remove as many heads, neurons and experts of a model without weights as will be removed."""
        from compress.stages.prune_decoder.width_sizes import Sizes

        Sizes.of(model, self).cut(model)
        return True

    def check_model(self, start: Path) -> None:
        """Raise `StageError` for a model without such parts, or of which none would be left."""
        from compress.stages.prune_decoder.pruning import check_prunable

        check_prunable(Checkpoint(start), self)

    def infer_shapes(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Return the model with any heads, neurons, experts and layers removed."""
        return self._pruned(model, context, blind=True)

    def run(self, model: Checkpoint, context: Context) -> Checkpoint:
        """Write the pruned model into other files, which one process does for all."""
        from compress.stages.training.processes import is_first

        return self._pruned(model, context) if is_first() else model

    def _pruned(self, model: Checkpoint, context: Context, blind: bool = False) -> Checkpoint:
        from compress.stages.prune_decoder.pruning import prune

        return prune(model, self, context, blind)
