"""Interface of every kind of model, and its files. Importing this module or a model class imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

from compress.utils.errors import ModelError
from compress.utils.read_limits import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import (
        BaseImageProcessor,
        FeatureExtractionMixin,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

    # transformers' classes that prepare inputs have no common base class.
    Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin


@runtime_checkable
class Model(Protocol):
    """Model that can be saved as a directory in Hugging Face layout, which other tools can load."""

    kind: ClassVar[str]

    def save(self, directory: Path) -> None:
        """Write every file of the model into an existing, empty ``directory``."""

    @classmethod
    def load(cls, directory: Path, task: Loader) -> Self:
        """Open the result of `save`; ``task`` matters for torch models only. Raises `ModelError` for other content."""


def only_file(artifact: Path, suffix: str, written_by: str, beside: Collection[str] = ()) -> Path:
    """Return the only file with a suffix at or below ``artifact``.

    Args:
        artifact: A folder, the file itself, or a folder that users treat as a file (such as an `.mlpackage`).
        suffix: Suffix of the file.
        written_by: Stage that writes such files, for the hint.
        beside: Names of files and folders to skip.

    Raises:
        ModelError: If there is not exactly one such file.
    """
    files = files_in(artifact, suffix, beside)
    # The artifact is the file itself, or a package folder.
    if artifact.exists() and artifact.suffix == suffix and not files:
        return artifact
    if not artifact.is_dir():
        fault = f"is no {suffix} file" if artifact.exists() else "does not exist"
        raise ModelError(f"The artifact {fault}.", where=str(artifact), expected=f"a model folder or a {suffix} file")
    if len(files) != 1:
        names = ", ".join(file.relative_to(artifact).as_posix() for file in files) or "none"
        raise ModelError(
            f"The folder holds {len(files)} {suffix} files ({names}).",
            where=str(artifact),
            expected="exactly one",
            hint=f"name the {suffix} file itself" if files else f"write one with the stage {written_by} first",
        )
    return files[0]


def files_in(artifact: Path, suffix: str, beside: Collection[str] = ()) -> list[Path]:
    """Return the files with a suffix at or below a folder, except those in ``beside`` or in folders named there."""
    paths = sorted(artifact.rglob(f"*{suffix}"))
    return [path for path in paths if not {*path.relative_to(artifact).parts} & {*beside}]


def read_companions(directory: Path, but: Collection[Path] = (), below: Path | None = None) -> dict[str, bytes]:
    """Return the content of every file of ``directory`` by relative path.

    Args:
        directory: Folder to read.
        but: The model's own files, which are skipped.
        below: Subfolder to skip.
    """
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path not in but)
    # Subfolders keep their relative paths.
    companions = (path for path in files if below is None or below not in path.parents)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in companions}


def write_companions(directory: Path, companions: Mapping[str, bytes]) -> None:
    """Write companion files into ``directory``, each at its relative path."""
    for name, content in companions.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link the file ``source`` (links resolved) to ``target``; copy it if the file system refuses."""
    try:
        # The Hub's cache consists of symbolic links, so link to the target file.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class Loader(Protocol):
    """Loader of a whole folder: a task, which determines the model class."""

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor; a missing head is created for ``labels``. Raises `ModelError`."""


@dataclass
class TorchModel:
    """transformers model and the processor that prepares its inputs."""

    kind: ClassVar[str] = "torch"
    generates_images: ClassVar[bool] = False
    """True for a diffusion model of several components; see `compress.models.pipeline_folder`."""
    module: PreTrainedModel
    processor: Processor

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
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the processor's tokenizer, or the processor itself if it is a tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def replace_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
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
    try:
        value = parse_json(content)
    except ValueError as error:
        hint = "fetch or write the file again"
        raise ModelError(f"{path.name} is not valid JSON: {error}.", where=str(path), hint=hint) from error
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _save_processor(processor: Processor, folder: Path) -> None:
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
