"""Networks of timm by their architecture's name, without any weights. Importing this imports torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.models.custom_module import PlainModule
from compress.models.remote_code import MODULE_KEY
from compress.utils.errors import MissingExtraError

_FETCHES = frozenset(("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"))
"""What timm's `create_model` would read weights by, which a config may not have it do."""


def build(architecture: str, num_classes: int, **arguments: Any) -> nn.Module:
    """The network, its weights drawn; with no classes it gives the features before its head, pooled.

    ``arguments`` are those of timm's `create_model`. Raises `MissingExtraError` without timm, and `ValueError` for a
    name that it doesn't know or arguments that would fetch something.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError("timm", "timm", "A model of timm") from error
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}")
    if refused := _FETCHES & arguments.keys():
        raise ValueError(f"{', '.join(sorted(refused))} is no part of an architecture")
    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **arguments)
    return network


def change_head(module: PlainModule, classes: int) -> None:
    """Give a network of timm a new head for so many ``classes``, none for 0, in place, and tell its config."""
    network: Any = module.network
    network.reset_classifier(classes)
    made = getattr(module.config, MODULE_KEY)
    setattr(module.config, MODULE_KEY, {**made, "arguments": {**made["arguments"], "num_classes": classes}})
