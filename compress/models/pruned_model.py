"""Loading of transformers models with pruned parts that their architecture's config cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.models.pruned_layer_sizes import CHANNELS_KEY, resize_to_recorded
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY, resize_to_recorded_parts


def is_pruned(config: Any) -> bool:
    """Return True if ``config`` records pruned heads, neurons or channels."""
    return any(getattr(config, key, None) for key in (HEADS_KEY, NEURONS_KEY, CHANNELS_KEY))


def load_pruned(auto: Any, directory: Path, config: Any) -> Any:
    """Load the model of auto class ``auto`` that `TorchModel.save` wrote to ``directory``.

    transformers loads the weights, because only it maps stored names to an architecture's modules. It gets a subclass
    whose layers are resized right after construction. Raises `ModelError` if recorded sizes do not fit.
    """
    import torch

    with torch.device("meta"):
        model_class: type[Any] = type(auto.from_config(config))

    def init(module: Any, own: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(module, own, *arguments, **options)
        resize_to_recorded_parts(module)
        resize_to_recorded(module, own, str(directory / "config.json"))

    resized_class = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    module = resized_class.from_pretrained(directory, config=config, use_safetensors=True)  # type: ignore[attr-defined]
    # The subclass has done its work; the model is an instance of the original class.
    module.__class__ = model_class
    return module
