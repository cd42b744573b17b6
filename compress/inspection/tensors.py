"""Tensors of a model folder or file in any format, from headers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.formats.registry import FORMATS
from compress.formats.spec import Reference, load
from compress.models.folder_checks import INDEX, PICKLE_SUFFIXES, pickle_error, unreadable_model_error, weight_files
from compress.models.pipeline_folder import is_pipeline
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError


@dataclass(frozen=True)
class TensorReader:
    """Reference to a function that reads the tensors of files with a suffix.

    ``graph`` is True if a file contains operators in addition to tensors.
    """

    suffix: str
    read_tensors: Reference
    graph: bool = True

    def read(self, file: Path, root: Path) -> list[StoredTensor]:
        """Return the tensors of ``file``, which may be stored in other files. Raises `ModelError`."""
        read_tensors: Callable[[Path, Path], list[StoredTensor]] = load(self.read_tensors)
        return read_tensors(file, root)


READERS = {
    spec.name: TensorReader(spec.tensors_suffix or spec.suffix, spec.tensors, spec.has_graph)
    for spec in FORMATS.values()
    if spec.tensors is not None
}
"""Reader of each format, in the order in which a folder is searched."""


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
    try:
        return _read(path, *_weights(path))
    except OSError as error:
        raise unreadable_model_error(error, path) from error


def _read(path: Path, form: str, weights: tuple[Path, ...]) -> ModelContents:
    root = path if path.is_dir() else path.parent
    tensors = _counted_once([tensor for file in weights for tensor in _of_part(form, file, root)], root)
    # External data files belong to the weights.
    weight_paths = (*weights, *sorted({tensor.path for tensor in tensors}.difference(weights)))
    files = tuple(sorted(item for item in path.rglob("*") if item.is_file())) if path.is_dir() else weight_paths
    return ModelContents(form, tensors, weight_paths, files)


def _of_part(form: str, file: Path, root: Path) -> list[StoredTensor]:
    """Return the tensors of a file; those of a pipeline's part are prefixed with the part's name."""
    tensors = READERS[form].read(file, root)
    # Parts of a pipeline have equal tensor names, so they are prefixed.
    if not is_pipeline(root) or file.parent == root:
        return tensors
    part = file.relative_to(root).parts[0].removesuffix("_decoder")
    return [
        tensor if tensor.name.startswith(f"{part}.") else tensor.model_copy(update={"name": f"{part}.{tensor.name}"})
        for tensor in tensors
    ]


def _weights(path: Path) -> tuple[str, tuple[Path, ...]]:
    suffixes = {reader.suffix: form for form, reader in READERS.items()}
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise pickle_error(path)
        if suffix not in suffixes:
            raise ModelError(
                f"{path.name} is not a file type that can be inspected.",
                where=str(path),
                expected=f"a model folder or a file ending in {', '.join(suffixes)}",
                hint="Name the file that holds the weights.",
            )
        return suffixes[suffix], (path,)
    # An exported pipeline has graphs in place of safetensors.
    graphs = is_pipeline(path) and any(path.glob("*/*.onnx"))
    if (path / "model.safetensors").is_file() or (path / INDEX).is_file() or (is_pipeline(path) and not graphs):
        return "safetensors", weight_files(path)
    # A sentence encoder in any format has modules beside it whose weights are safetensors.
    for suffix, form in sorted(suffixes.items(), key=lambda file: file[1] == "safetensors"):
        companions = FORMATS[form].beside
        files = tuple(
            sorted(file for file in path.rglob(f"*{suffix}") if file.is_file() and file.name not in companions)
        )
        if files:
            return form, files
    weight_files(path)  # raises: a pickle, an adapter, or nothing at all
    raise AssertionError("a folder without weights is refused above")


def _counted_once(tensors: list[StoredTensor], root: Path) -> tuple[StoredTensor, ...]:
    """Merge tensors at one location of an external file: the first keeps the bytes, the others point to it."""
    first: dict[str, str] = {}
    counted = []
    for tensor in tensors:
        location, owner = tensor.tied_to, first.get(tensor.tied_to or "")
        # The first tensor at a location owns its bytes.
        if location is not None and owner is None:
            first[location] = tensor.name
        update: dict[str, object] = {
            "tied_to": owner,
            "file": tensor.path.relative_to(root).as_posix() if tensor.path.is_relative_to(root) else tensor.path.name,
        }
        counted.append(tensor.model_copy(update=update | ({"bytes": 0, "parameters": 0} if owner else {})))
    return tuple(counted)
