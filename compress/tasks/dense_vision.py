"""Shared functions of tasks whose answers are positions in an image: loading, fixed size, additional inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.torch_model import TorchModel
from compress.tasks.image_inputs import encode_images
from compress.tasks.lazy_examples import Joined
from compress.tasks.task import Examples
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def load_model(
    task: str,
    directory: Path,
    heads: Sequence[str],
    labels: Sequence[str] | None,
    trust_remote_code: bool,
    answers: Callable[[Any, Any, Any], Any],
) -> TorchModel:
    """Load weights and image processor by `AutoModelFor` plus the first of ``heads``. A missing head is initialized.

    Args:
        task: Name of the task, for messages.
        directory: Folder of the model.
        heads: Suffixes of class names that have the head.
        labels: Class names for a new head.
        trust_remote_code: Allow code of the repository.
        answers: Adapts the outputs of a plain torch module (see `compress.models.custom_module`).

    Raises:
        ModelError: If files do not load.
        DataError: If a trained head lacks a label.
    """
    from compress.models.processor import load_processor
    from compress.tasks.loading import Origin, load_with_head

    expected = "an image model with a preprocessor_config.json, in Hugging Face layout"
    origin = Origin(task, directory, load_processor, expected, answers)
    return load_with_head(origin, heads, labels, trust_remote_code)


def encode_places(
    values: Sequence[Mapping[str, Any]], processor: Any, more: Sequence[Mapping[str, np.ndarray]]
) -> Examples:
    """Return images of equal size with additional inputs ``more`` for each. Raises `DataError`.

    Augmentation would move the answers, so ``black_pixel`` is None.
    """
    check_size(processor)
    examples = encode_images(values, processor)
    return replace(examples, inputs=Joined(examples.inputs, more), black_pixel=None)


def check_size(processor: Any) -> None:
    """Raise `DataError` for a processor that keeps the sizes of images."""
    size = getattr(processor, "size", None) or {}
    if getattr(processor, "do_resize", False) and size.get("height") and size.get("width"):
        return
    description = ", ".join(f"{name} {value}" for name, value in dict(size).items() if value) or "as they are"
    raise DataError(
        f"The model's processor leaves each picture in a size of its own: {description}.",
        where="preprocessor_config.json",
        expected="one size for all, which the graph that ships is made for",
        hint='write "do_resize": true, "do_pad": false and "size": {"height": 512, "width": 512} into it, in pixels '
        "that suit the model",
    )
