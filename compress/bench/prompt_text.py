"""A person's own text as the prompt of a model."""

from __future__ import annotations

from pathlib import Path

from compress.checkpoints.checks import check_processor
from compress.checkpoints.json_file import read_json
from compress.checkpoints.processor import load_tokenizer
from compress.errors import InputError, ModelError
from compress.formats.model_file import model_file

_CHARACTERS_A_TOKEN = 64
"""Nobody's tokens are longer on average, so that no more of a large file has to be encoded."""


def encode_text(artifact: Path, text: Path, count: int) -> list[int]:
    """The first ``count`` token ids of a UTF-8 file, or all where it has fewer, by the tokenizer beside the model.

    Raises `InputError` for a file that is no text, `ModelError` where there is no tokenizer that loads.
    """
    try:
        with text.open(encoding="utf-8") as stream:
            content = stream.read(_CHARACTERS_A_TOKEN * count)
    except OSError as error:
        raise InputError(f"The text cannot be read: {error.strerror}.", where=str(text)) from error
    except UnicodeDecodeError as error:
        raise InputError("The file is no text in UTF-8.", where=str(text), expected="plain text") from error
    folder = _tokenizer_folder(artifact)
    check_processor(folder, read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    return [int(token) for token in tokenizer(content, verbose=False)["input_ids"][:count]]


def _tokenizer_folder(artifact: Path) -> Path:
    file = model_file(artifact)
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        "There is no config.json beside the model, and so no tokenizer to read the text with.",
        where=str(file.parent),
        expected="a folder with config.json and the tokenizer's files",
        mend="leave out --text: tokens are drawn at random then",
    )
