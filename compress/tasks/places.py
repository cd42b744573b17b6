"""What tasks share whose answers are places in a picture: pictures of one size, models, and more of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.torch_model import TorchModel
from compress.errors import DataError, ModelError
from compress.tasks.images import encode_images
from compress.tasks.joined import Joined
from compress.tasks.task import Examples

if TYPE_CHECKING:
    import numpy as np


def load_model(
    task: str, directory: Path, heads: Sequence[str], labels: Sequence[str] | None, trust_remote_code: bool
) -> TorchModel:
    """Weights and image processor for `AutoModelFor` the first of ``heads``, endings of the classes that have one.

    A missing head is drawn for ``labels`` from torch's generator. Raises `ModelError` for files that do not load and
    `DataError` for labels that a trained head lacks.
    """
    import transformers

    from compress.architectures.cut_model import is_cut, load_cut
    from compress.checkpoints.checks import refuse_quantized
    from compress.checkpoints.config_check import loading_failures
    from compress.checkpoints.processor import load_processor
    from compress.tasks.classes import set_labels

    refuse_quantized(directory)
    auto: Any = getattr(transformers, f"AutoModelFor{heads[0]}")
    try:
        processor = load_processor(directory)
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if labels is not None:
            set_labels(config, labels, any(head in name for head in heads for name in config.architectures or ()))
        if is_cut(config):
            module = load_cut(auto, directory, config)
        else:
            module = auto.from_pretrained(
                directory, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except loading_failures() as error:
        raise ModelError(
            f"The model cannot be loaded for {task}: {error}",
            where=str(directory),
            expected="an image model with a preprocessor_config.json, in Hugging Face layout",
        ) from error
    return TorchModel(module.float().eval(), processor)


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
        mend='write "do_resize": true, "do_pad": false and "size": {"height": 512, "width": 512} into it, in pixels '
        "that suit the model",
    )
