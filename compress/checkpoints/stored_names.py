"""What a checkpoint calls the tensors that transformers' modules call otherwise."""

from __future__ import annotations

from pathlib import Path

import torch


def stored_names(folder: Path) -> dict[str, str]:
    """Tensors of the causal model of a folder that are stored whole under another name: by theirs, the stored one.

    Asked of transformers' own conversion, the one that `save_pretrained` applies: it is given a number for each tensor.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = list(shapes)
    marks = {name: torch.tensor(index).expand(shapes[name]) for index, name in enumerate(names)}
    found = {}
    for stored, mark in revert_weight_conversion(model, marks).items():
        name = names[int(mark.flatten()[0])] if mark.numel() else stored
        if name != stored and mark.shape == shapes[name]:
            found[name] = stored
    return found
