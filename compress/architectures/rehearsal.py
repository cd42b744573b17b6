"""Whether parts of a model can be cut, tried on one without weights before any work is done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from compress.architectures.description import blocks, stacks
from compress.architectures.transformer import check_heads_apart, keep_heads, keep_layers, keep_neurons
from compress.checkpoints.config_check import loading_failures
from compress.errors import ModelError, StageError, first_line


def check_cuts(folder: Path, *, layers: bool, heads: bool, neurons: bool) -> None:
    """Cut a layer, a head or a neuron of the model that ``folder``'s config.json describes, on the meta device.

    Raises `StageError` naming the part that isn't known. Models that transformers has no class for are passed over:
    whoever loads them says so.
    """
    module = _hollow(folder)
    if module is None:
        return
    if layers:
        _check_layers(module)
    if heads:
        check_heads_apart(module)
        keep_heads(module, [range(max(block.places - 1, min(block.places, 1))) for block in blocks(module)])
    if neurons:
        found = [range(max(block.neurons - 1, min(block.neurons, 1))) for block in blocks(module)]
        keep_neurons(module, [torch.tensor(kept, dtype=torch.long) for kept in found])


def check_kept_layers(folder: Path, kept: tuple[int, ...]) -> None:
    """Keep these layers of the model that ``folder`` describes. Raises `StageError` where they cannot be told."""
    module = _hollow(folder)
    if module is not None:
        keep_layers(module, kept)


def _check_layers(module: Any) -> None:
    """Raise the last layer's error where none can go."""
    count = sum(map(len, stacks(module).values()))
    for index in range(count):
        try:
            keep_layers(copy.deepcopy(module), [other for other in range(count) if other != index])
        except StageError:
            if index == count - 1:
                raise
        else:
            return


def _hollow(folder: Path) -> Any:
    """The model without weights and head, or None."""
    from transformers import AutoConfig, AutoModel

    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except loading_failures():
        return None
    if type(config) not in AutoModel._model_mapping:
        return None
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except loading_failures() as error:
        raise ModelError(
            f"transformers makes no model of this config: {first_line(error)}",
            where=str(folder / "config.json"),
            expected="an architecture that transformers knows, with the fields that it needs",
        ) from error
