"""A torch model with its processor, as a directory in Hugging Face layout. Importing this imports no torch."""

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
    """What loads a folder whole: a task, which knows the class of its models."""

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor; a missing head is created for ``labels``. Raises `ModelError`."""


@dataclass
class TorchModel:
    """A transformers model and the processor that prepares its inputs."""

    kind: ClassVar[str] = "torch"
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
        """Open what `save` wrote. Raises `ModelError` for a folder that holds something else."""
        from compress.models.folder_checks import check_model_folder

        check_model_folder(directory)
        return task.load(directory, None, trust_remote_code=False)

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def tokenizer(self) -> Any:
        """The processor, or the tokenizer that it holds beside other things."""
        return getattr(self.processor, "tokenizer", self.processor)

    def replace_tokenizer(self, tokenizer: Any) -> None:
        """Put ``tokenizer`` where `tokenizer` is."""
        if self.tokenizer is self.processor:
            self.processor = tokenizer
        else:
            self.processor.tokenizer = tokenizer

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight and buffer by name, with those of layers that the processor keeps behind the module."""
        import torch

        modules = getattr(self.processor, "modules", None)
        beside = {} if modules is None else modules.weights()
        return {**self.module.state_dict(), **{name: torch.from_numpy(array) for name, array in beside.items()}}

    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the model's ids."""
        names: dict[int, str] = self.module.config.id2label
        return tuple(names[index] for index in sorted(names))

    def companions(self) -> dict[str, bytes]:
        """Config and processor files (path in the folder -> content): what must lie beside the weights in any format.

        JSON is written without indentation, which for a tokenizer is a third of its size.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.module.config.save_pretrained(folder)
            _save_processor(self.processor, Path(folder))
            found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): compact(path) for path in found}


def compact(path: Path) -> bytes:
    """The content of a file, that of JSON without the spaces between its parts."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    return json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":")).encode()


def _save_processor(processor: Any, folder: Path) -> None:
    """Write a processor's files, those of a feature extractor under the name that every reader knows."""
    processor.save_pretrained(folder)
    for name in ("feature_extractor", "image_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            # transformers 5 puts all parts into one file, which transformers.js and optimum don't read.
            part.save_pretrained(folder)
    forget_where_from(folder)


_TOKENIZER = "tokenizer_config.json"
_WHERE_FROM = ("is_local", "local_files_only")


def forget_where_from(folder: Path) -> None:
    """Take out of a tokenizer's config whether it was read offline, so that the same model is the same bytes."""
    path = folder / _TOKENIZER
    if not path.is_file():
        return
    told = json.loads(path.read_text())
    kept = {name: value for name, value in told.items() if name not in _WHERE_FROM}
    if kept != told:
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
