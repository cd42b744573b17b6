"""The tokenizer that lies in a model's folder. Importing this imports no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import ModelError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder in Hugging Face layout. Raises `ModelError` where it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ModelError(
            f"The tokenizer cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(folder),
            expected="the tokenizer's files in Hugging Face layout",
        ) from error
