"""The file of an artifact that a runtime opens, whatever its format."""

from __future__ import annotations

from pathlib import Path

from compress.checkpoints.model import only_file
from compress.formats.registry import DEFAULT, FORMATS, part_of


def format_of(artifact: Path) -> str:
    """The format of a file, or of a folder that holds one such: the first of several, or of all. Nothing is opened."""
    for form, spec in FORMATS.items():
        if artifact.suffix == spec.suffix or (artifact.is_dir() and any(artifact.rglob(f"*{spec.suffix}"))):
            return form
    return DEFAULT


def model_file(artifact: Path) -> Path:
    """The one file of an artifact. Raises `ModelError` where there isn't exactly one."""
    form = format_of(artifact)
    find = part_of(form, "find")
    if find is None:
        return only_file(artifact, FORMATS[form].suffix, FORMATS[form].written_by)
    found: Path = find(artifact)
    return found


def model_files(artifact: Path) -> tuple[Path, ...]:
    """The files of a model, in the order in which they run. Raises `ModelError` for those of no one model."""
    find = part_of(format_of(artifact), "find_all")
    return (model_file(artifact),) if find is None else tuple(find(artifact))


def check_writable(folder: Path, form: str) -> None:
    """Raise `ModelError` where the architecture, or the tokenizer, of a language model has no place in a format."""
    check = part_of(form, "check_writable")
    if check is not None:
        check(folder)
