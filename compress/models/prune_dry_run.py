"""Whether parts of a model can be cut, tried on one without weights before any work is done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from compress.models.config_checks import loading_failures
from compress.models.structure import blocks, stacks
from compress.models.transformer_pruning import check_heads_apart, keep_heads, keep_layers, keep_neurons, left
from compress.utils.errors import ModelError, StageError, first_line


def check_cuts(folder: Path, *, layers: bool, heads: float, neurons: float) -> None:
    """Cut a layer, and shares of heads and neurons, of the model of ``folder``'s config.json, on the meta device.

    Raises `StageError` naming the part that isn't known, of which none would be left, or of which so little is asked
    that nothing would go. Models that transformers has no class for are passed over: whoever loads them says so.
    """
    module = _hollow(folder)
    if module is None:
        return
    if layers:
        _check_layers(module)
    if heads:
        check_heads_apart(module)
    before = sum(parameter.numel() for parameter in module.parameters())
    cut_any(module, 0, heads, neurons)
    if (heads or neurons) and not layers and sum(parameter.numel() for parameter in module.parameters()) == before:
        asked = {"heads": heads, "feed_forward": neurons}
        raise StageError(
            f"{' and '.join(f'{name} {share:g}' for name, share in asked.items() if share)} would cut nothing.",
            expected="a share that comes to one of a layer's parts at least",
            hint="cut a larger share",
        )


def cut_any(module: Any, layers: int, heads: float, neurons: float) -> None:
    """Cut as many layers, heads and neurons as `prune`, the last of each, in place: the same sizes, unseen data.

    ``heads`` and ``neurons`` are shares of each block's. Raises `StageError`.
    """
    if layers:
        keep_layers(module, list(range(sum(map(len, stacks(module).values())) - layers)))
    found = blocks(module) if heads or neurons else []
    if heads:
        keep_heads(module, [range(left(block.places, heads, "attention heads")) for block in found])
    if neurons:
        counts = [left(block.neurons, neurons, "feed-forward neurons") for block in found]
        keep_neurons(module, [torch.arange(count) for count in counts])


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
