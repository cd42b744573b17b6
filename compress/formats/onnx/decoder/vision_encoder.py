"""Export of the vision encoder of a vision-language model: image features as a graph, compared with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from compress.formats.generation.image_text import FEATURES, PIXELS
from compress.formats.onnx.export import ExportedGraph, export_onnx, verify_parity
from compress.models.checkpoint import Checkpoint
from compress.models.hooks import removed_on_exit
from compress.models.lora_adapter import load_adapted
from compress.models.model import TorchModel
from compress.models.processor import load_processor
from compress.tasks.image_text_to_text import unfit_processor
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAST = ("multi_modal_projector", "connector")
"""Names of the module whose output takes the place of an image's tokens."""


@dataclass
class ImageFeatures(ModelOutput):  # type: ignore[misc]  # transformers' own has no types
    """Output of the vision encoder, [images, tokens, hidden]."""

    image_features: torch.Tensor | None = None


@dataclass(frozen=True)
class _Features:
    """A `Head` that returns the features."""

    outputs: ClassVar[tuple[str, ...]] = (FEATURES,)
    answer: ClassVar[str] = FEATURES
    answer_label: ClassVar[str] = "image features"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features [images, tokens, hidden]."""
        return outputs[FEATURES]


class _VisionEncoder(nn.Module):
    """Module that computes image features, as one tensor if ``merged``.

    transformers splits the features image by image, which would freeze the number of images in a trace.
    """

    def __init__(self, model: PreTrainedModel, merged: bool) -> None:
        super().__init__()
        self.model, self.config, self._whole = model, model.config, merged

    def forward(self, pixel_values: torch.Tensor) -> ImageFeatures:
        if not self._whole:
            return ImageFeatures(torch.stack(list(self.model.get_image_features(pixel_values).pooler_output)))
        if pixel_values.ndim == len(("batch", "images", "channels", "height", "width")):
            # Of several images of a text transformers leaves out those that are padding, as many as there may be.
            base: Any = self.model.base_model
            hidden = base.vision_model(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state
            return ImageFeatures(feature_projector(self.model)(hidden))
        with removed_on_exit(
            [feature_projector(self.model).register_forward_hook(lambda module, given, found: [found])]
        ):
            try:
                (features,) = self.model.get_image_features(pixel_values).pooler_output
            except (AttributeError, ValueError) as error:
                raise TypeError(f"its class does more with an image's features: {first_line(error)}") from error
        return ImageFeatures(features)


def feature_projector(model: Any) -> nn.Module:
    """Return the module that projects image features to the text's width. Raises `ModelError` if there is none."""
    projector = next(
        (candidate for name in _LAST if (candidate := getattr(model.base_model, name, None)) is not None), None
    )
    if not isinstance(projector, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no module that projects image features to the text's width.",
            expected=f"a part called {' or '.join(_LAST)}, as LLaVA's",
            hint="ship the checkpoint, and judge it on the target torch",
        )
    return projector


def check_vision_encoder(folder: Path, model: Any) -> None:
    """Raise `ModelError` for a model whose images cannot be processed by a graph.

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
    """Export the graph from `pixel_values` to `image_features`, and return it with its difference from torch.

    Raises `ModelError` for an unsupported model, `IntegrityError` for features that differ.
    """
    pixels = [{PIXELS: example[PIXELS]} for example in examples.inputs]
    pixel_examples = Examples(pixels, {PIXELS: None}, head=_Features())
    module = load_adapted(checkpoint)
    feature_projector(module)
    # The graph is traced from merged features and compared with the model's own, split ones.
    traced, plain = (TorchModel(_VisionEncoder(module, merged), None) for merged in (True, False))
    exported = export_onnx(traced, pixel_examples, None, fusions=True)
    return exported, verify_parity(exported.graph, plain, pixel_examples, tolerance)
