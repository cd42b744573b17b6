"""Networks of timm by architecture name, without pretrained weights. Importing this module imports torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.models.config_checks import MODULE_KEY
from compress.models.custom_module import CustomModule
from compress.utils.errors import MissingExtraError

_FETCHES = frozenset(("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"))
"""Arguments of timm's `create_model` that load weights or configs from elsewhere, and which a config may not set."""


def build(architecture: str, num_classes: int, **arguments: object) -> nn.Module:
    """Build a timm network with random weights; with 0 classes it returns pooled features.

    Args:
        architecture: timm's name of the architecture.
        num_classes: Number of classes of the head.
        **arguments: Further arguments of timm's `create_model`.

    Raises:
        MissingExtraError: If timm is not installed.
        ValueError: If timm does not have the architecture, or an argument would load something.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError("timm", "timm", "A model of timm") from error
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}")
    # Pretrained weights come from the folder and not from timm's servers.
    if refused := _FETCHES & arguments.keys():
        raise ValueError(f"{', '.join(sorted(refused))} is no part of an architecture")
    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **arguments)
    return network


def change_head(module: CustomModule, classes: int) -> None:
    """Give a timm network a new head for ``classes`` (0: no head), in place, and record it in its config."""
    network: Any = module.network
    network.reset_classifier(classes)
    builder = getattr(module.config, MODULE_KEY)
    setattr(module.config, MODULE_KEY, {**builder, "arguments": {**builder["arguments"], "num_classes": classes}})
