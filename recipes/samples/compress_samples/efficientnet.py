"""Conversion of EfficientNet-lite0's state dict to a folder with safetensors and configuration."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

CLASSES = 1000
SIDE = 224
MEAN, SCALE = 127, 128
"""Inputs of the model are (x - 127) / 128, for x from 0 to 255."""


def write_model(members: Path, files: Path, progress: Progress) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json. Raises `SampleError`.

    The state dict is read with torch's ``weights_only``, so that no code in it is run.
    """
    source = next(path for path in sorted(members.rglob("*")) if path.suffix == ".pth")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        tensors = {str(name): tensor.contiguous() for name, tensor in state.items()}
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise SampleError(f"{source.name} is not a state dict of tensors: {error}") from error
    save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", _config()), ("preprocessor_config.json", _preprocessor())):
        (files / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    total = sum(tensor.numel() for tensor in tensors.values())
    progress.note(f"efficientnet-lite0: {len(tensors)} tensors, {total:,} values in float32")


def _config() -> dict[str, object]:
    """Return the configuration, with the class ids of ILSVRC 2012 and the closest known model type."""
    names = [str(index) for index in range(CLASSES)]
    return {
        "model_type": "efficientnet",
        "architectures": ["EfficientNetForImageClassification"],
        "image_size": SIDE,
        "num_channels": 3,
        "id2label": {name: name for name in names},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _preprocessor() -> dict[str, object]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN / 255] * 3,
        "image_std": [SCALE / 255] * 3,
    }
