"""LoRA adapters with a nonzero weight update, saved by peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel


def save_adapter(module: PreTrainedModel, folder: Path, *targets: str, **fields: Any) -> Path:
    """Save an adapter for layers whose names end in ``targets`` and return ``folder``; changes ``module`` in place."""
    torch.manual_seed(1)
    module.name_or_path = "tiny"  # peft writes it into the config
    given = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False}
    config = LoraConfig(**{**given, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an API that transformers has deprecated
        get_peft_model(module, config).save_pretrained(str(folder), save_embedding_layers=False)
    return folder
