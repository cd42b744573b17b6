"""A model without weights: transformers' own modules on the meta device, and what its files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.models.config_checks import loading_failures, to_blame
from compress.utils.errors import ModelError, first_line


def hollow_decoder(folder: Path) -> Any:
    """The causal language model that ``folder``'s config.json describes, without its weights.

    Raises `ModelError` for an architecture that transformers doesn't know or cannot build.
    """
    from transformers import AutoModelForCausalLM

    return _hollow(folder, lambda config: AutoModelForCausalLM)


def hollow_model(folder: Path) -> Any:
    """As `hollow_decoder`; of an encoder and a decoder, if that is what the config describes, both."""
    return _hollow(folder, auto_class)


def auto_class(config: Any) -> Any:
    """transformers' class for a language model, one that reads images too, or for an encoder and its decoder."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )

    if not getattr(config, "is_encoder_decoder", False):
        return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    speech = type(config) in AutoModelForSpeechSeq2Seq._model_mapping
    return AutoModelForSpeechSeq2Seq if speech else AutoModelForSeq2SeqLM


def reads_images(config: Any) -> bool:
    """Whether a decoder reads images as tokens; those that transformers has as language models too count as such."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = type(config)
    return kind in AutoModelForImageTextToText._model_mapping and kind not in AutoModelForCausalLM._model_mapping


def _hollow(folder: Path, class_of: Callable[[Any], Any]) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            return class_of(config).from_config(config, dtype=torch.float32).eval()
    except loading_failures() as error:
        raise to_blame(folder, False) or ModelError(
            f"transformers makes no causal language model of this config: {first_line(error)}",
            where=str(folder / "config.json"),
            expected="an architecture that AutoModelForCausalLM knows",
        ) from error


def stored_shapes(model: Any) -> Mapping[str, torch.Size]:
    """Shapes of the tensors that `save_pretrained` writes, by the names that they have in files.

    A tied head isn't among them. Experts that transformers joins as it loads are one by one where files have them so.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}


def stored_names(folder: Path) -> dict[str, str]:
    """Tensors of the causal model of a folder that are stored whole under another name: by theirs, the stored one.

    Asked of transformers' own conversion, the one that `save_pretrained` applies: it is given a number for each tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = hollow_model(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = list(shapes)
    marks = {name: torch.tensor(index).expand(shapes[name]) for index, name in enumerate(names)}
    found = {}
    for stored, mark in revert_weight_conversion(model, marks).items():
        name = names[int(mark.flatten()[0])] if mark.numel() else stored
        if name != stored and mark.shape == shapes[name]:
            found[name] = stored
    return found
