"""File of an artifact that a runtime opens, in any format, and a model that consists of such a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.formats.registry import DEFAULT, FORMATS, part_of
from compress.models.model import only_file, read_companions, write_companions


def format_of(artifact: Path) -> str:
    """Return the format of a file, or of a folder that holds such a file, without opening it.

    The first matching format is returned, or the first of all formats if none matches.
    """
    return next((form for form in FORMATS if holds(artifact, form)), DEFAULT)


def holds(artifact: Path, form: str) -> bool:
    """Return whether ``artifact`` is a file of a format or a folder that holds one."""
    suffix = FORMATS[form].suffix
    return artifact.suffix == suffix or (artifact.is_dir() and any(artifact.rglob(f"*{suffix}")))


def model_file(artifact: Path) -> Path:
    """Return the only model file of an artifact.

    Raises:
        ModelError: The artifact does not hold exactly one model file.
    """
    return file_of(artifact, format_of(artifact))


def file_of(artifact: Path, form: str) -> Path:
    """Return the only file of a format at or below ``artifact``.

    Raises:
        ModelError: There is not exactly one such file.
    """
    spec = FORMATS[form]
    return only_file(artifact, spec.suffix, spec.written_by or "finetune", spec.beside)


def model_files(artifact: Path, runtime: str | None = None) -> tuple[Path, ...]:
    """Return the files of a model in the order in which they run, or only the files that ``runtime`` opens.

    Raises:
        ModelError: The files do not form one model.
    """
    form = format_of(artifact)
    if runtime is not None and runtime not in FORMATS[form].runtimes:
        # A runtime may open several formats, and the artifact may contain files of more than one.
        opened = [name for name, spec in FORMATS.items() if runtime in spec.runtimes]
        form = next((name for name in opened if holds(artifact, name)), opened[0])
    return _files_of(artifact, form)


def _files_of(artifact: Path, form: str) -> tuple[Path, ...]:
    find = part_of(form, "find_all")
    return (file_of(artifact, form),) if find is None else tuple(find(artifact))


def check_writable(folder: Path, form: str) -> None:
    """Raise `ModelError` if a format cannot store the architecture or the tokenizer of a language model."""
    check = part_of(form, "check_writable")
    if check is not None:
        check(folder)


@dataclass(frozen=True)
class FileModel:
    """A file of the format `kind` with what belongs to it, as a folder. Contents by their paths below it.

    ``own`` are what the runtime reads, ``companions`` are config, tokenizer and whatever else lies there.
    """

    kind: ClassVar[str]
    own: Mapping[str, bytes] = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open a folder that `save` wrote.

        Raises:
            ModelError: The folder does not hold exactly one complete model file.
        """
        files = [file for model_file in _files_of(directory, cls.kind) for file in cls.files_with(model_file)]
        contents = {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
        return cls(contents, read_companions(directory, files))

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """Return ``file`` and the files that it needs to be complete; raise `ModelError` if one of them is missing."""
        return (file,)

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        write_companions(directory, {**self.own, **self.companions})
