"""Interface of every kind of model, and its files. Importing this module or a model class imports no torch."""

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
