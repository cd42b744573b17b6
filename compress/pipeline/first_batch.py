"""Check that rows of the test split pass through the starting model's preprocessing and fit its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.dataset import TEST, Dataset
from compress.models.config_checks import MODULE_KEY, is_timm, load_error_types
from compress.models.json_file import read_json
from compress.tasks.capability import SINGLE_CALL, TAKES_IMAGES, takes_media
from compress.tasks.task import Examples, Task
from compress.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4
_TOKENIZER = "tokenizer.json"


def check_first_batch(task: Task, folder: Path, data: Dataset, max_length: int) -> None:
    """Pass a few test rows through the model's preprocessing, and images through its layers without weights.

    Texts pass through the tokenizer alone, without transformers, whose import takes seconds.

    Args:
        task: The recipe's task.
        folder: Folder of the starting model, with a config.json.
        data: The recipe's data that is local.
        max_length: Number of tokens after which texts are truncated.

    Raises:
        InputError: If the processor or the model does not accept the rows.
    """
    if TEST not in data.tables:
        return
    rows = data.tables[TEST].slice(0, _ROWS)
    if not takes_media(task.capabilities):
        if (folder / _TOKENIZER).is_file():
            texts = [column.name for column in data.columns if column.is_input and column.name in rows.column_names]
            _check_tokenizer(folder / _TOKENIZER, [text for name in texts for text in rows[name].to_pylist()])
        return
    from compress.models.processor import load_processor

    # Labels are checked by the data, and their ids need the model's head.
    examples = task.encode(rows, load_processor(folder), None, max_length)
    if {TAKES_IMAGES, SINGLE_CALL} <= task.capabilities:
        _check_images(folder, examples)


def _check_tokenizer(path: Path, texts: list[str]) -> None:
    """Raise `ModelError` for a tokenizer.json that the tokenizers library cannot read or apply."""
    from compress.models.processor import read_tokenizer, tokenizer_errors

    tokenizer = read_tokenizer(path)
    with tokenizer_errors(path):
        tokenizer.encode_batch(texts)


def _check_images(folder: Path, examples: Examples) -> None:
    """Raise `InputError` if the model's layers do not accept the preprocessed images."""
    import torch

    batch = examples.batch(range(len(examples)))
    model = _without_weights(folder)
    if model is None or set(batch) != {model.main_input_name}:
        return
    inputs = {name: torch.empty(array.shape, device="meta") for name, array in batch.items()}
    try:
        with torch.no_grad():
            model(**inputs)
    except (ValueError, RuntimeError) as error:
        # Some operations need values, which tensors on the meta device do not have.
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return
        height, width = next(iter(batch.values())).shape[-2:]
        size = getattr(model.config, "image_size", None)
        raise InputError(
            f"The model does not accept images of {width} x {height} pixels, as its processor returns them: "
            f"{first_line(error)}",
            where=str(folder / "preprocessor_config.json"),
            expected=f"images of {size} pixels, the image_size of config.json" if size else "images of another size",
            hint=f'write "do_resize": true and "size": {{"height": {size}, "width": {size}}} into it'
            if isinstance(size, int)
            else "let the processor resize images to the size that the model was trained with",
        ) from error


def _without_weights(folder: Path) -> PreTrainedModel | None:
    """Return transformers' model of a folder on the meta device, or None for other models and those with own code."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = read_json(folder / "config.json")
    if MODULE_KEY in config or is_timm(config) or "auto_map" in config:
        return None
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    except load_error_types():
        # An architecture without a base class is checked when its weights are loaded.
        return None
    return model.eval()
