"""What lies around the transformer of a sentence encoder: the tokenizer before it, pooling and the rest after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.checkpoints.sentence_modules import MODULES, SentenceModules, has_modules, read_modules
from compress.errors import ModelError


class SentenceProcessor:
    """A tokenizer together with the modules that make one embedding of its tokens'.

    It is called as the tokenizer is, and has what the tokenizer has; saving it writes the files of both, so that the
    folder opens in sentence-transformers.
    """

    def __init__(self, tokenizer: Any, modules: SentenceModules) -> None:
        self.tokenizer = tokenizer
        self.modules = modules

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's encoding."""
        return self.tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("tokenizer", "modules"):  # while it is being made or copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and those of the modules, some of them in folders of their own."""
        self.tokenizer.save_pretrained(folder)
        for name, content in self.modules.files(self.tokenizer.model_max_length).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def sentence_processor(folder: Path, tokenizer: Any, width: int | None = None) -> SentenceProcessor:
    """``tokenizer`` with the modules of ``folder``; of a plain encoder of that ``width``, with mean pooling.

    That is what sentence-transformers does with such a folder. Raises `ModelError` for modules that don't fit.
    """
    if width is not None and not has_modules(folder):
        return SentenceProcessor(tokenizer, SentenceModules(width))
    modules = read_modules(folder)
    if width is not None and modules.width != width:
        raise ModelError(
            f"The pooling is for {modules.width} dimensions, and the model's tokens have {width}.",
            where=str(folder / MODULES),
            expected=f"a word_embedding_dimension of {width}",
        )
    return SentenceProcessor(tokenizer, modules)
