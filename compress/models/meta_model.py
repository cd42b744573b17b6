"""transformers models on the meta device, without weights, and the names and shapes of their stored tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.models.config_checks import explain_load_failure, load_error_types
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_decoder_on_meta(folder: Path) -> PreTrainedModel:
    """Build the causal language model that ``folder``'s config.json describes, without weights.

    Raises `ModelError` for an architecture that transformers does not have or cannot build.
    """
    from transformers import AutoModelForCausalLM

    return build_on_meta(folder, lambda config: AutoModelForCausalLM)


def auto_class(config: PretrainedConfig) -> Any:
    """Return transformers' auto class for a language, vision-language or encoder-decoder model."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    if not getattr(config, "is_encoder_decoder", False):
        return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    # Speech models are encoder-decoders with their own auto class.
    is_speech = type(config) in AutoModelForSpeechSeq2Seq._model_mapping
    return AutoModelForSpeechSeq2Seq if is_speech else AutoModelForSeq2SeqLM


def reads_images(config: PretrainedConfig) -> bool:
    """Return True for an architecture that transformers has as image-text-to-text model only, not as language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mappings = AutoModelForImageTextToText._model_mapping, AutoModelForCausalLM._model_mapping
    return type(config) in mappings[0] and type(config) not in mappings[1]


def build_on_meta(folder: Path, class_of: Callable[[Any], Any] = auto_class) -> PreTrainedModel:
    """Build the model of a folder's config.json without weights; ``class_of`` returns transformers' auto class.

    By default this is a language, vision-language or encoder-decoder model. Raises `ModelError` for an architecture
    that transformers does not have or cannot build.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A quantization config would make transformers replace linear layers by packed ones.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # Buffers are computed for real: their values (such as rotary frequencies) are not stored in files.
        with init_empty_weights(include_buffers=False):
            return class_of(config).from_config(config, dtype=torch.float32).eval()
    except load_error_types() as error:
        raise explain_load_failure(folder, False) or ModelError(
            f"transformers cannot build a causal language model from this config: {first_line(error)}",
            where=str(folder / "config.json"),
            expected="an architecture that AutoModelForCausalLM knows",
        ) from error


def stored_shapes(model: PreTrainedModel) -> Mapping[str, torch.Size]:
    """Return the shapes of the tensors that `save_pretrained` writes, by their stored names.

    A tied head is not among them. Experts that transformers fuses while loading are separate if files separate them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Tied weights are stored once, under the name of the embedding.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}


def stored_names(folder: Path) -> dict[str, str]:
    """Map names of a model's tensors to their stored names, for tensors that files hold whole under another name.

    transformers' own conversion, which `save_pretrained` applies, is run on one number per tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = build_on_meta(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = list(shapes)
    marks = {name: torch.tensor(index).expand(shapes[name]) for index, name in enumerate(names)}
    renamed = {}
    # The number in each converted tensor tells which tensor of the model it came from.
    for stored, mark in revert_weight_conversion(model, marks).items():
        name = names[int(mark.flatten()[0])] if mark.numel() else stored
        # Tensors that are split or joined have other shapes and are left out.
        if name != stored and mark.shape == shapes[name]:
            renamed[name] = stored
    return renamed
