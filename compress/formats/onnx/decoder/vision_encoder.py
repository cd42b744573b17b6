"""The part of a vision-language model that sees: its features of images as a graph, proven equal to torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from compress.formats.onnx.export import ExportedGraph, export_onnx, verify_parity
from compress.models.checkpoint import Checkpoint
from compress.models.hooks import removed_on_exit
from compress.models.lora_adapter import load_adapted
from compress.models.processor import load_processor
from compress.models.torch_model import TorchModel
from compress.runtimes.image_answers import FEATURES, PIXELS
from compress.tasks.image_text_to_text import unfit_processor
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAST = ("multi_modal_projector", "connector")
"""What classes call the module whose output stands in the place of an image's tokens."""


@dataclass
class ImageFeatures(ModelOutput):  # type: ignore[misc]  # transformers' own has no types
    """What `vision_encoder` gives, [images, tokens, hidden]."""

    image_features: torch.Tensor | None = None


@dataclass(frozen=True)
class _Features:
    """A `Head`: the features as they are."""

    outputs: ClassVar[tuple[str, ...]] = (FEATURES,)
    answer: ClassVar[str] = FEATURES
    many: ClassVar[str] = "image features"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[images, tokens, hidden]."""
        return outputs[FEATURES]


class _Sees(nn.Module):
    """The part of a model that makes features of images: ``whole``, of all of them in one tensor.

    transformers goes on to part them image by image, which would freeze in a trace how many there are.
    """

    def __init__(self, model: PreTrainedModel, whole: bool) -> None:
        super().__init__()
        self.model, self.config, self._whole = model, model.config, whole

    def forward(self, pixel_values: torch.Tensor) -> ImageFeatures:
        if not self._whole:
            return ImageFeatures(torch.stack(list(self.model.get_image_features(pixel_values).pooler_output)))
        if pixel_values.ndim == len(("batch", "images", "channels", "height", "width")):
            # Of several images of a text transformers leaves out those that are padding, as many as there may be.
            whole: Any = self.model.base_model
            seen = whole.vision_model(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state
            return ImageFeatures(feature_projector(self.model)(seen))
        with removed_on_exit(
            [feature_projector(self.model).register_forward_hook(lambda module, given, found: [found])]
        ):
            try:
                (features,) = self.model.get_image_features(pixel_values).pooler_output
            except (AttributeError, ValueError) as error:
                raise TypeError(f"its class does more with an image's features: {first_line(error)}") from error
        return ImageFeatures(features)


def feature_projector(model: Any) -> nn.Module:
    """The module that makes the features. Raises `ModelError` for a model that has none of its kind."""
    found = next((one for name in _LAST if (one := getattr(model.base_model, name, None)) is not None), None)
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no module of its own that makes an image's features fit its text.",
            expected=f"a part called {' or '.join(_LAST)}, as LLaVA's",
            hint="ship the checkpoint, and judge it on the target torch",
        )
    return found


def check_vision_encoder(folder: Path, model: Any) -> None:
    """Raise `ModelError` for a model whose images cannot be written as a graph.

    ``model`` may be without its weights.
    """
    problem = unfit_processor(load_processor(folder))
    if problem:
        raise ModelError(
            f"The model cannot be written as three graphs: {problem}.",
            where=str(folder),
            expected="a model that is given tokens and the pixels of one image, such as LLaVA",
            hint="ship the checkpoint",
        )
    feature_projector(model)


def export_vision_encoder(checkpoint: Checkpoint, examples: Examples, tolerance: float) -> tuple[ExportedGraph, float]:
    """The graph from `pixel_values` to `image_features`, and how far these are from torch on ``examples``.

    Raises `ModelError` for a model of another kind, `IntegrityError` for features that differ.
    """
    pixels = [{PIXELS: example[PIXELS]} for example in examples.inputs]
    alone = Examples(pixels, {PIXELS: None}, head=_Features())
    module = load_adapted(checkpoint)
    feature_projector(module)
    traced, plain = (TorchModel(_Sees(module, whole), None) for whole in (True, False))
    exported = export_onnx(traced, alone, None, fusions=True)
    return exported, verify_parity(exported.graph, plain, alone, tolerance)
