"""Tensors of a model folder or file in any format, from headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.formats.registry import FORMATS
from compress.formats.spec import load
from compress.models.folder_checks import INDEX, PICKLE_SUFFIXES, pickle_error, unreadable_model_error, weight_files
from compress.models.pipeline_folder import is_pipeline
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError

SUFFIXES = {spec.tensors_suffix or spec.suffix: spec for spec in FORMATS.values() if spec.tensors is not None}
"""Format of each suffix whose files contain readable tensors, in the order in which a folder is searched."""


@dataclass(frozen=True)
class ModelContents:
    """Tensors of a model, the files that hold them, and all files of the model."""

    format: str
    tensors: tuple[StoredTensor, ...]
    weight_files: tuple[Path, ...]
    files: tuple[Path, ...]


def read_model(path: Path) -> ModelContents:
    """Return the contents of a file or folder; tensors that share bytes are counted once. Raises `ModelError`."""
    if not path.exists():
        raise ModelError("There is no such file or folder.", where=str(path), hint="Check the path.")
    root = path if path.is_dir() else path.parent
    try:
        form, weights = _weights(path)
        tensors = tuple(_tensors(form, weights, root))
        # External data files belong to the weights.
        weight_paths = (*weights, *sorted({tensor.path for tensor in tensors}.difference(weights)))
        files = tuple(sorted(item for item in path.rglob("*") if item.is_file())) if path.is_dir() else weight_paths
    except OSError as error:
        raise unreadable_model_error(error, path) from error
    return ModelContents(form, tensors, weight_paths, files)


def _tensors(form: str, weights: tuple[Path, ...], root: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of all files. Of those at one location of an external file, the first keeps the bytes."""
    reader = FORMATS[form].tensors
    assert reader is not None, "`_weights` finds files whose tensors can be read"
    read_tensors: Callable[[Path, Path], list[StoredTensor]] = load(reader)
    first: dict[str, str] = {}
    for file in weights:
        # Parts of a pipeline have equal tensor names, so they are prefixed with the part's name.
        is_part = is_pipeline(root) and file.parent != root
        prefix = f"{file.relative_to(root).parts[0].removesuffix('_decoder')}." if is_part else ""
        for tensor in read_tensors(file, root):
            name = tensor.name if tensor.name.startswith(prefix) else prefix + tensor.name
            owner = first.get(tensor.tied_to or "")
            if tensor.tied_to is not None:
                first.setdefault(tensor.tied_to, name)
            path = tensor.path
            relative = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
            update = {"name": name, "tied_to": owner, "file": relative}
            yield tensor.model_copy(update={**update, **({"bytes": 0, "parameters": 0} if owner else {})})


def _weights(path: Path) -> tuple[str, tuple[Path, ...]]:
    """Return the format of a model and its files with weights."""
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise pickle_error(path)
        if suffix not in SUFFIXES:
            raise ModelError(
                f"{path.name} is not a file type that can be inspected.",
                where=str(path),
                expected=f"a model folder or a file ending in {', '.join(SUFFIXES)}",
                hint="Name the file that holds the weights.",
            )
        return SUFFIXES[suffix].name, (path,)
    # An exported pipeline has graphs in place of safetensors.
    graphs = is_pipeline(path) and any(path.glob("*/*.onnx"))
    if (path / "model.safetensors").is_file() or (path / INDEX).is_file() or (is_pipeline(path) and not graphs):
        return "safetensors", weight_files(path)
    # A sentence encoder in any format has modules beside it whose weights are safetensors.
    for suffix, spec in sorted(SUFFIXES.items(), key=lambda entry: entry[1].name == "safetensors"):
        files = (file for file in path.rglob(f"*{suffix}") if file.is_file() and file.name not in spec.beside)
        if weights := tuple(sorted(files)):
            return spec.name, weights
    weight_files(path)  # raises: a pickle, an adapter, or nothing at all
    raise AssertionError("a folder without weights is refused above")
