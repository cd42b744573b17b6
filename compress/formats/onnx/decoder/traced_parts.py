"""Traced parts of a model with names of inputs and outputs: decoders, and encoders of text, speech and images.

Names and axes are those of transformers.js and optimum.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
import torch
from torch import nn
from transformers.utils import ModelOutput

from compress.formats.generation.image_text import FEATURES, PIXELS
from compress.formats.onnx.decoder.caches import (
    CROSS,
    create_cache,
    create_encoder_decoder_cache,
    holds_keys,
    iterate_layers,
)
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
    from transformers import Cache, PretrainedConfig, PreTrainedModel


BATCH = "batch_size"
IDS, MASK, HIDDEN, AUDIO = "input_ids", "attention_mask", "encoder_hidden_states", "input_features"
EMBEDS, PLACES = "inputs_embeds", "position_ids"
CACHED, ENCODER_MASK = "use_cache_branch", "encoder_attention_mask"
_READ, _WRITTEN = "encoder_sequence_length", "decoder_sequence_length"
_ROWS, _SEEN = 2, 7
"""Rows and encoder positions of a trace. No two axes have the same size, and none has size 1, which would be frozen."""
_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the argument that holds a model's cache."""
Axes = Sequence[int | str]

_LAST = ("multi_modal_projector", "connector")
"""Names of the module whose output takes the place of an image's tokens."""


@dataclass(frozen=True)
class TracedPart:
    """Type and axes of each input except the cache; the ``output`` and its ``axes`` except the last.

    ``decoder_only``: a decoder without an encoder, whose mask defines the past. ``cached``: keys are cached.
    ``tokens``: the input with the new tokens, as ids or embedded. ``takes_positions``: positions are an input, and the
    graph rotates queries and keys itself and uses no operator of ONNX Runtime except attention.
    """

    inputs: Mapping[str, tuple[ir.DataType, Axes]]
    output: str
    axes: Axes
    decoder_only: bool = False
    cached: bool = True
    tokens: str = IDS
    takes_positions: bool = False

    def root(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that holds the blocks."""
        is_whole_model = self.decoder_only and self.tokens == IDS
        module: nn.Module = model if is_whole_model else model.get_decoder() if self.cached else model.get_encoder()
        return module

    def cache(self, model: object, blocks: int) -> Any:
        """Return an empty cache, or None if nothing is cached."""
        if not self.cached:
            return None
        return create_cache(model) if self.decoder_only else create_encoder_decoder_cache(blocks)

    def axes_of(self, name: str, shape: Sequence[int], time: str) -> Axes:
        """Return the axes of a tensor of the cache with a sample's ``shape``; ``time`` is `past` or `present`."""
        kind = name.split("_")[1]
        # States have a fixed size.
        if not kind.endswith(("key", "value")):
            return [BATCH, *shape[1:]]
        side = "encoder_" if kind.startswith(CROSS) else "decoder_"
        if self.decoder_only:
            side, time = "", "past" if time == "past" else "total"
        return [BATCH, shape[1], f"{time}_{side}sequence_length", shape[3]]

    def sample(self, new: int, past: int) -> dict[str, torch.Tensor]:
        """Return inputs of a trace except the cache: ``new`` tokens after ``past`` ones."""
        sizes: dict[Any, int] = {_NEW[1]: new, _TOTAL[1]: past + new, BATCH: _ROWS, _WRITTEN: new, _READ: _SEEN}
        sample_inputs = {}
        for name, (dtype, axes) in self.inputs.items():
            shape: list[Any] = [sizes.get(axis, axis) for axis in axes]
            sample_inputs[name] = torch.randn(shape) if dtype == _FLOATS else torch.ones(shape, dtype=torch.int64)
        return sample_inputs

    def padding(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the mask [batch, positions] int32 of attention to all positions."""
        mask = None if self.decoder_only else inputs.get(MASK if not self.cached else ENCODER_MASK)
        return None if mask is None else mask.to(torch.int32)

    def call(self, model: PreTrainedModel, cache: Cache, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the part and return its output."""
        if not self.cached:
            hidden: torch.Tensor = model.get_encoder()(**inputs).last_hidden_state
            return hidden
        parameters = inspect.signature(type(model).forward).parameters
        # The name of the cache argument depends on the model.
        word = next((name for name in _CACHES if name in parameters), None)
        named: dict[str, Any] = {"use_cache": True} if word is None else {word: cache, "use_cache": True}
        if self.decoder_only:
            new, mask = inputs[self.tokens], inputs[MASK]
            past = mask.shape[1] - new.shape[1]
            if PLACES in parameters:
                named[PLACES] = inputs[PLACES] if PLACES in inputs else (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            # A model of states alone takes the mask of the new tokens.
            if not any(holds_keys(layer) for _, _, layer in iterate_layers(cache)):
                mask = mask[:, past:]
            named |= {self.tokens: new, MASK: mask}
        else:
            from transformers.modeling_outputs import BaseModelOutput

            named["encoder_outputs"] = BaseModelOutput(last_hidden_state=inputs[HIDDEN])
            named["decoder_input_ids"] = inputs[IDS]
            # Positions continue after the cached tokens.
            if "decoder_position_ids" in parameters:
                past_length = cache.get_seq_length()
                named["decoder_position_ids"] = torch.arange(past_length, past_length + inputs[IDS].shape[1])[None]
            if ENCODER_MASK in inputs:
                named["attention_mask"] = inputs[ENCODER_MASK]
        logits: torch.Tensor = model(**named).logits
        return logits


_INTEGERS, _FLOATS = ir.DataType.INT64, ir.DataType.FLOAT


_NEW, _TOTAL = [BATCH, "sequence_length"], [BATCH, "total_sequence_length"]


def decoder_only(model: object) -> TracedPart:
    """Return a language model that reads prompts and single tokens."""
    return TracedPart({IDS: (_INTEGERS, _NEW), MASK: (_INTEGERS, _TOTAL)}, "logits", _NEW, decoder_only=True)


def decoder_with_positions(model: object) -> TracedPart:
    """Return a language model whose positions are an input."""
    inputs = {IDS: (_INTEGERS, _NEW), MASK: (_INTEGERS, _TOTAL), PLACES: (_INTEGERS, _NEW)}
    return TracedPart(inputs, "logits", _NEW, decoder_only=True, takes_positions=True)


def decoder_of_embeddings(model: PreTrainedModel) -> TracedPart:
    """Return a language model whose tokens are embedded already, those of images among them."""
    inputs = {EMBEDS: (_FLOATS, [*_NEW, model.get_input_embeddings().embedding_dim]), MASK: (_INTEGERS, _TOTAL)}
    return TracedPart(inputs, "logits", _NEW, decoder_only=True, tokens=EMBEDS)


def encoder_of_pair(model: PreTrainedModel) -> TracedPart:
    """Return the encoder of a model of text or speech."""
    if _reads_audio(model):
        config = model.config
        frames = 2 * config.max_source_positions  # its second convolution goes by steps of two
        audio = {AUDIO: (_FLOATS, [BATCH, config.num_mel_bins, frames])}
        return TracedPart(audio, "last_hidden_state", [BATCH, config.max_source_positions], cached=False)
    texts = {name: (_INTEGERS, [BATCH, _READ]) for name in (IDS, MASK)}
    return TracedPart(texts, "last_hidden_state", [BATCH, _READ], cached=False)


def decoder_of_pair(model: PreTrainedModel) -> TracedPart:
    """Return the decoder behind a model's encoder, with its head."""
    inputs: dict[str, tuple[ir.DataType, Axes]] = {}
    if not _reads_audio(model):
        inputs[ENCODER_MASK] = _INTEGERS, [BATCH, _READ]
    inputs[IDS] = _INTEGERS, [BATCH, _WRITTEN]
    inputs[HIDDEN] = _FLOATS, [BATCH, _READ, _width(model.config)]
    return TracedPart(inputs, "logits", [BATCH, _WRITTEN])


def _reads_audio(model: PreTrainedModel) -> bool:
    """Return whether the encoder reads audio features. Raises `ModelError` if it reads neither these nor text."""
    main_input = getattr(model, "main_input_name", IDS)
    if main_input == AUDIO and hasattr(model.config, "max_source_positions") and hasattr(model.config, "num_mel_bins"):
        return True
    if main_input == IDS and _width(model.config):
        return False
    raise ModelError(
        f"{type(model).__name__} takes {main_input}.",
        expected=f"an encoder of {IDS} or, in windows of one length, {AUDIO}",
    )


def _width(config: PretrainedConfig) -> int:
    """Return the width of an encoder's output, which may have a config of its own; 0 if it is unknown."""
    return int(getattr(config, "d_model", 0) or getattr(getattr(config, "encoder", None), "hidden_size", 0))


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
        hook = feature_projector(self.model).register_forward_hook(lambda module, inputs, output: [output])
        with removed_on_exit([hook]):
            try:
                (features,) = self.model.get_image_features(pixel_values).pooler_output
            except (AttributeError, ValueError) as error:
                raise TypeError(f"its class does more with an image's features: {first_line(error)}") from error
        return ImageFeatures(features)


def feature_projector(model: PreTrainedModel) -> nn.Module:
    """Return the module that projects image features to the text's width. Raises `ModelError` if there is none."""
    candidates = (getattr(model.base_model, name, None) for name in _LAST)
    projector = next((candidate for candidate in candidates if candidate is not None), None)
    if not isinstance(projector, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no module that projects image features to the text's width.",
            expected=f"a part called {' or '.join(_LAST)}, as LLaVA's",
            hint="ship the checkpoint, and judge it on the target torch",
        )
    return projector


def check_vision_encoder(folder: Path, model: PreTrainedModel) -> None:
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
