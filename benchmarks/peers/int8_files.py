"""Model folders by several quantizers, beside each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from onnx.shape_inference import InferenceError

from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.utils.errors import CompressError
from compress.utils.progress import Progress

OURS, FLOAT = "ours", "fp32"
Ways = Mapping[str, Callable[[], OnnxModel]]
"""What each file is called in the tables -> how it is made."""


def write_files(ways: Ways, folder: Path, progress: Progress) -> tuple[dict[str, Path], list[str]]:
    """A model folder below ``folder`` for each of ``ways``; one that fails or doesn't open is left out, with a note.

    One that is there was finished by a run before, and is taken.
    """
    files, notes = {}, []
    for name, way in ways.items():
        target_folder = folder / folder_name(name)
        if target_folder.is_dir():
            files[name] = target_folder
            continue
        progress.note(f"-- {name}")
        partial = folder / f"{target_folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model = way()
            partial.mkdir(parents=True)
            model.save(partial)
            get_runtime("onnxruntime").open(partial, TARGETS["cpu"], 1)
            partial.replace(target_folder)
        except (CompressError, ValueError, RuntimeError, LookupError, InferenceError, *FAILURES) as error:
            shutil.rmtree(partial, ignore_errors=True)
            notes.append(f"{name}: no file, {_first_line(error)}")
            continue
        files[name] = target_folder
    return files, notes


def folder_name(name: str) -> str:
    """The folder of the file that the tables call ``name``."""
    return name.replace(" ", "-").replace(",", "").replace("'", "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
