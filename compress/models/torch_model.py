"""torch model with its processor, saved in Hugging Face layout. Importing this module imports no torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel


class Loader(Protocol):
    """Loader of a whole folder: a task, which determines the model class."""

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor; a missing head is created for ``labels``. Raises `ModelError`."""


@dataclass
class TorchModel:
    """transformers model and the processor that prepares its inputs."""

    kind: ClassVar[str] = "torch"
    generates_images: ClassVar[bool] = False
    """True for a diffusion model of several components; see `compress.models.image_generation`."""
    module: PreTrainedModel
    processor: Any

    def save(self, directory: Path) -> None:
        """Write config, safetensors weights and processor files into ``directory``."""
        self.module.save_pretrained(directory, max_shard_size="4GB")
        # By way of a folder elsewhere, so that a full disk is an OSError: tokenizers would raise a bare Exception.
        with tempfile.TemporaryDirectory() as scratch:
            _save_processor(self.processor, Path(scratch))
            for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
                target = directory / path.relative_to(scratch)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    @classmethod
    def load(cls, directory: Path, task: Loader) -> TorchModel:
        """Open the result of `save`. Raises `ModelError` for other content."""
        from compress.models.folder_checks import check_model_folder

        # Check before torch opens any file.
        check_model_folder(directory)
        return task.load(directory, None, trust_remote_code=False)

    def parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def tokenizer(self) -> Any:
        """Return the processor's tokenizer, or the processor itself if it is a tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def replace_tokenizer(self, tokenizer: Any) -> None:
        """Replace the tokenizer in the processor."""
        if self.tokenizer is self.processor:
            self.processor = tokenizer
        else:
            self.processor.tokenizer = tokenizer

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every weight and buffer by name, including layers that belong to the processor."""
        import torch

        modules = getattr(self.processor, "modules", None)
        processor_weights = {} if modules is None else modules.weights()
        return {
            **self.module.state_dict(),
            **{name: torch.from_numpy(array) for name, array in processor_weights.items()},
        }

    def labels(self) -> tuple[str, ...]:
        """Return class names in the order of the model's ids."""
        names: dict[int, str] = self.module.config.id2label
        return tuple(names[index] for index in sorted(names))

    def companions(self) -> dict[str, bytes]:
        """Return config and processor files by path: the files that accompany the weights in any format.

        JSON is written without indentation, which is a third of a tokenizer's size.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.module.config.save_pretrained(folder)
            _save_processor(self.processor, Path(folder))
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): minified_content(path) for path in paths}


def minified_content(path: Path) -> bytes:
    """Return the content of a file; JSON without optional whitespace."""
    content = path.read_bytes()
    # Other formats are copied unchanged.
    if path.suffix != ".json":
        return content
    return json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":")).encode()


def _save_processor(processor: Any, folder: Path) -> None:
    """Write a processor's files; a feature extractor gets the file name that every reader expects."""
    # Writes all parts, some of them only in a joint file.
    processor.save_pretrained(folder)
    for name in ("feature_extractor", "image_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            # transformers 5 puts all parts into one file, which transformers.js and optimum don't read.
            part.save_pretrained(folder)
    remove_load_options(folder)


_TOKENIZER = "tokenizer_config.json"
_WHERE_FROM = ("is_local", "local_files_only")


def remove_load_options(folder: Path) -> None:
    """Remove from a tokenizer's config whether it was loaded offline, so that equal models have equal bytes."""
    path = folder / _TOKENIZER
    if not path.is_file():
        return
    config = json.loads(path.read_text())
    remaining = {name: value for name, value in config.items() if name not in _WHERE_FROM}
    if remaining != config:
        path.write_text(json.dumps(remaining, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
