"""The file of an artifact that a runtime opens, whatever its format, and a model that is such a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.formats.registry import DEFAULT, FORMATS, part_of
from compress.models.model import only_file, read_companions, write_companions


def format_of(artifact: Path) -> str:
    """The format of a file, or of a folder that holds one such: the first of several, or of all. Nothing is opened."""
    return next((form for form in FORMATS if holds(artifact, form)), DEFAULT)


def holds(artifact: Path, form: str) -> bool:
    """Whether it is a file of a format, or a folder that holds one."""
    suffix = FORMATS[form].suffix
    return artifact.suffix == suffix or (artifact.is_dir() and any(artifact.rglob(f"*{suffix}")))


def model_file(artifact: Path) -> Path:
    """The one file of an artifact. Raises `ModelError` where there isn't exactly one."""
    return file_of(artifact, format_of(artifact))


def file_of(artifact: Path, form: str) -> Path:
    """The one file of a format at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    spec = FORMATS[form]
    return only_file(artifact, spec.suffix, spec.written_by or "finetune", spec.beside)


def model_files(artifact: Path, runtime: str | None = None) -> tuple[Path, ...]:
    """The files of a model, in the order in which they run; those that ``runtime`` opens, if one is named.

    Raises `ModelError` for those of no one model.
    """
    form = format_of(artifact)
    if runtime is not None and runtime not in FORMATS[form].runtimes:
        opened = [one for one, spec in FORMATS.items() if runtime in spec.runtimes]
        form = next((one for one in opened if holds(artifact, one)), opened[0])
    return _files_of(artifact, form)


def _files_of(artifact: Path, form: str) -> tuple[Path, ...]:
    find = part_of(form, "find_all")
    return (file_of(artifact, form),) if find is None else tuple(find(artifact))


def check_writable(folder: Path, form: str) -> None:
    """Raise `ModelError` where the architecture, or the tokenizer, of a language model has no place in a format."""
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
        """Open what `save` wrote. Raises `ModelError` for a folder without one such file, or one a part, whole."""
        own = tuple(file for found in _files_of(directory, cls.kind) for file in cls.files_with(found))
        contents = {path.relative_to(directory).as_posix(): path.read_bytes() for path in own}
        return cls(contents, read_companions(directory, own))

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """``file`` and those that it isn't whole without. Raises `ModelError` where it isn't."""
        return (file,)

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        write_companions(directory, {**self.own, **self.companions})
