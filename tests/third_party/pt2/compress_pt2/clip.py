"""Clip outliers of matrices, because they would widen the grid of 8-bit weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import Context, Stage


class Clip(Stage[TorchModel, TorchModel]):
    """Each matrix is clipped to a quantile of its weights' magnitudes."""

    packages = ("torch",)
    kind: Literal["clip"] = "clip"
    quantile: float = Field(0.999, gt=0.5, lt=1, description="share of the weights that keep their value")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Clip in place."""
        import torch

        clipped = 0
        for weight in model.module.parameters():
            if weight.ndim == 2:
                bound = float(torch.quantile(weight.detach().abs().flatten()[: 1 << 24], self.quantile))
                clipped += int((weight.detach().abs() > bound).sum())
                weight.data.clamp_(-bound, bound)
        context.note(f"clip: {clipped:,} weights")
        return model
