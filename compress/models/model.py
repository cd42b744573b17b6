"""What every kind of model can do. Importing this module, or a model class, imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.models.torch_model import Loader


@runtime_checkable
class Model(Protocol):
    """A model as a directory in Hugging Face layout, loadable by other people's tools."""

    kind: ClassVar[str]

    def save(self, directory: Path) -> None:
        """Write every file of the model into an existing, empty ``directory``."""

    @classmethod
    def load(cls, directory: Path, task: Loader) -> Self:
        """Open what `save` wrote; a task has a say in torch models alone. Raises `ModelError` for something else."""


def only_file(artifact: Path, suffix: str, written_by: str, beside: Collection[str] = ()) -> Path:
    """The only file of that ``suffix`` at or below ``artifact``. Raises `ModelError` where there isn't exactly one.

    It may be a folder that people know as a file. ``written_by`` is the stage that makes such a file; see `files_in`.
    """
    found = files_in(artifact, suffix, beside)
    if artifact.exists() and artifact.suffix == suffix and not found:
        return artifact
    if not artifact.is_dir():
        what = f"is no {suffix} file" if artifact.exists() else "does not exist"
        raise ModelError(f"The artifact {what}.", where=str(artifact), expected=f"a model folder or a {suffix} file")
    if len(found) != 1:
        names = ", ".join(file.relative_to(artifact).as_posix() for file in found) or "none"
        raise ModelError(
            f"The folder holds {len(found)} {suffix} files ({names}).",
            where=str(artifact),
            expected="exactly one",
            hint=f"name the {suffix} file itself" if found else f"write one with the stage {written_by} first",
        )
    return found[0]


def files_in(artifact: Path, suffix: str, beside: Collection[str] = ()) -> list[Path]:
    """Files of that ``suffix`` at or below a folder, but those whose names, or whose folders', are ``beside`` them."""
    found = sorted(artifact.rglob(f"*{suffix}"))
    return [path for path in found if not {*path.relative_to(artifact).parts} & {*beside}]


def read_companions(directory: Path, but: Collection[Path] = (), below: Path | None = None) -> dict[str, bytes]:
    """Every file of ``directory`` but those of the model itself, and but all of a folder ``below`` it."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path not in but)
    beside = (path for path in files if below is None or below not in path.parents)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in beside}


def write_companions(directory: Path, companions: Mapping[str, bytes]) -> None:
    """Write them into ``directory``, each at its path."""
    for name, content in companions.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file that ``source`` is, links followed, the name ``target`` as well; copy it where that can't be."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
