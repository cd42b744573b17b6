"""What tasks share whose answers are places in a picture: pictures of one size, models, and more of each example."""

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
    """Weights and image processor for `AutoModelFor` the first of ``heads``, endings of the classes that have one.

    ``answers`` is what those of a plain module are made (`plain_module`). A missing head is drawn for ``labels`` from
    torch's generator. Raises `ModelError` for files that do not load and `DataError` for labels that a trained head
    lacks.
    """
    from compress.models.processor import load_processor
    from compress.tasks.loading import Origin, load_with_head

    expected = "an image model with a preprocessor_config.json, in Hugging Face layout"
    origin = Origin(task, directory, load_processor, expected, answers)
    return load_with_head(origin, heads, labels, trust_remote_code)


def encode_places(
    values: Sequence[Mapping[str, Any]], processor: Any, more: Sequence[Mapping[str, np.ndarray]]
) -> Examples:
    """Pictures brought to one size, and ``more`` of each beside its pixels. Raises `DataError`.

    Where in a picture something is changes with the picture, so that nothing here may vary it: ``black`` is None.
    """
    check_size(processor)
    examples = encode_images(values, processor)
    return replace(examples, inputs=Joined(examples.inputs, more), black=None)


def check_size(processor: Any) -> None:
    """Raises `DataError` for a processor that leaves pictures in sizes of their own."""
    size = getattr(processor, "size", None) or {}
    if getattr(processor, "do_resize", False) and size.get("height") and size.get("width"):
        return
    told = ", ".join(f"{name} {value}" for name, value in dict(size).items() if value) or "as they are"
    raise DataError(
        f"The model's processor leaves each picture in a size of its own: {told}.",
        where="preprocessor_config.json",
        expected="one size for all, which the graph that ships is made for",
        hint='write "do_resize": true, "do_pad": false and "size": {"height": 512, "width": 512} into it, in pixels '
        "that suit the model",
    )
