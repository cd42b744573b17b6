"""Loading transformers models that were cut in ways which their architecture's config has no words for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.models.pruned_layer_sizes import CHANNELS_KEY, shrink_to_recorded
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY, shrink_to_recorded_parts


def is_cut(config: Any) -> bool:
    """Whether heads, neurons or channels are recorded in ``config``."""
    return any(getattr(config, key, None) for key in (HEADS_KEY, NEURONS_KEY, CHANNELS_KEY))


def load_cut(auto: Any, directory: Path, config: Any) -> Any:
    """The model of class ``auto`` (an Auto class of transformers) that `TorchModel.save` wrote to ``directory``.

    transformers' own loader does it, since it alone knows by which names an architecture's weights are kept; it is
    given a class whose layers shrink as soon as they are made. Raises `ModelError` where what is recorded doesn't fit.
    """
    import torch

    with torch.device("meta"):
        whole: type[Any] = type(auto.from_config(config))

    def make(module: Any, own: Any, *arguments: Any, **options: Any) -> None:
        whole.__init__(module, own, *arguments, **options)
        shrink_to_recorded_parts(module)
        shrink_to_recorded(module, own, str(directory / "config.json"))

    shrinking = type(whole.__name__, (whole,), {"__init__": make, "__module__": whole.__module__})
    module = shrinking.from_pretrained(directory, config=config, use_safetensors=True)  # type: ignore[attr-defined]
    module.__class__ = whole
    return module
