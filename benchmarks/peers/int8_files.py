"""Model folders written by several quantizers."""

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
Makers = Mapping[str, Callable[[], OnnxModel]]
"""Name of a model in the tables -> function that makes it."""


def write_files(makers: Makers, folder: Path, progress: Progress) -> tuple[dict[str, Path], list[str]]:
    """Write a model folder for each maker. Return the folders by name, and notes on makers that fail.

    A folder that exists was finished by an earlier run and is used.
    """
    files, notes = {}, []
    for name, make in makers.items():
        target_folder = folder / folder_name(name)
        if target_folder.is_dir():
            files[name] = target_folder
            continue
        progress.note(f"-- {name}")
        partial = folder / f"{target_folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model = make()
            partial.mkdir(parents=True)
            model.save(partial)
            get_runtime("onnxruntime").open(partial, TARGETS["cpu"], 1)
            partial.replace(target_folder)
        except (CompressError, ValueError, RuntimeError, LookupError, InferenceError, *FAILURES) as error:
            shutil.rmtree(partial, ignore_errors=True)
            notes.append(f"{name}: failed, {_first_line(error)}")
            continue
        files[name] = target_folder
    return files, notes


def folder_name(name: str) -> str:
    """Return the folder name of a model."""
    return name.replace(" ", "-").replace(",", "").replace("'", "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
