"""Looking into a model of any kind: weights as transformers has them, or a format's."""

from __future__ import annotations

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.model import Model
from compress.checkpoints.torch_model import TorchModel
from compress.formats.probed import Probed
from compress.formats.registry import part_of


def probed(model: Model) -> Probed:
    """The way of looking into a model of its kind."""
    if isinstance(model, TorchModel):
        from compress.pipeline import probed_module

        return probed_module.PROBED(model)
    if isinstance(model, Checkpoint):
        from compress.pipeline import probed_checkpoint

        return probed_checkpoint.PROBED(model)
    found: Probed = part_of(model.kind, "probed")(model)
    return found
