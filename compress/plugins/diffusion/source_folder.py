"""Conversion of a diffusers folder to a starting folder: checked parts only. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.models.folder_checks import check_model_folder
from compress.models.json_file import read_json
from compress.models.model import link_or_copy
from compress.models.pipeline_folder import (
    CHECKER,
    CONFIG,
    MODEL_INDEX,
    SafetyChecker,
    component_classes,
    pipeline_config,
    weights_of,
)
from compress.plugins.diffusion.sampling_settings import SAMPLING
from compress.sources.build_model import write_once
from compress.utils.errors import ModelError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import digest_file

_CHECKING = (CHECKER, "feature_extractor")
"""A safety checker, and what prepares pictures for it."""
_REVISION = 1
"""Raised when the same files would be turned into another folder."""
_BESIDE = (".json", ".txt", ".model", ".jinja")


def converted_folder(folder: Path, cache: Path, checker: SafetyChecker | None) -> Path:
    """Where `convert_pipeline` puts what it makes of ``folder``; itself where there is nothing to make.

    Raises `ModelError`.
    """
    from compress.utils.storage import cache_key

    if (folder / CONFIG).is_file() and not _refused(folder, checker):
        return folder
    digests = {path.relative_to(folder).as_posix(): digest_file(path) for path in _files(folder, checker)}
    return cache / f"pipeline-{cache_key({'revision': _REVISION, 'files': digests, 'checker': checker})[:32]}"


def convert_pipeline(
    folder: Path, cache: Path, checker: SafetyChecker | None, progress: Progress | None = None
) -> Path:
    """The folder with the parts of ``folder`` and a config.json that says which pipeline they are.

    It lies below ``cache`` and is made at the first call; files are linked where they can be. Raises `ModelError` for a
    folder that is not whole, and for a safety checker where ``checker`` says nothing.
    """
    check_model_folder(folder)
    check_checker(folder, checker)
    target = converted_folder(folder, cache, checker)
    if target == folder or target.is_dir():
        return target
    (progress or SilentProgress()).note(f"making the parts of {folder.name} ready in {cache}")

    def write(made: Path) -> None:
        made.mkdir()
        for path in _files(folder, checker):
            place = made / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, place)
        index = _index(folder, checker)
        (made / MODEL_INDEX).unlink()
        (made / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (made / CONFIG).write_text(json.dumps(pipeline_config(index), indent=2) + "\n", encoding="utf-8")

    return write_once(target, write, "free some space or name another folder with --artifacts")


def check_checker(folder: Path, checker: SafetyChecker | None) -> None:
    """Raise `ModelError` for a pipeline with a safety checker of which ``checker`` says nothing."""
    if checker is None and CHECKER in component_classes(folder):
        raise ModelError(
            "The pipeline has a safety checker, and the recipe does not say whether to keep it.",
            where=str(folder / CHECKER),
            expected="safety_checker: keep or leave_out in the recipe",
            hint="write `safety_checker: leave_out` into the recipe and check the images that users see yourself; or "
            "`safety_checker: keep`, for recipes that write no ONNX",
        )


def _refused(folder: Path, checker: SafetyChecker | None) -> bool:
    """Whether there is a part that is not to be there."""
    return checker == "leave_out" and CHECKER in component_classes(folder)


def _index(folder: Path, checker: SafetyChecker | None) -> dict[str, Any]:
    index = dict(read_json(folder / MODEL_INDEX))
    without = _CHECKING if _refused(folder, checker) else ()
    return {name: [None, None] if name in without else value for name, value in index.items()}


def _files(folder: Path, checker: SafetyChecker | None) -> list[Path]:
    """What belongs to the parts: their weights, one variant of them, and small files."""
    found = [path for name in (MODEL_INDEX, SAMPLING) if (path := folder / name).is_file()]
    for name in component_classes(folder):
        if name in _CHECKING and _refused(folder, checker):
            continue
        small = [path for path in sorted((folder / name).rglob("*")) if path.suffix in _BESIDE and path.is_file()]
        weights = weights_of(folder / name) if any((folder / name).glob("*.safetensors")) else ()
        found += [*small, *weights]
    return found
