"""The tensors of a model folder or file, from headers alone, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.formats.registry import FORMATS
from compress.formats.spec import Reference, load
from compress.models.diffusion_checks import is_pipeline
from compress.models.folder_checks import INDEX, PICKLE_SUFFIXES, pickle_refusal, unreadable, weight_files
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import ModelError


@dataclass(frozen=True)
class TensorReader:
    """What ``read_tensors`` refers to reads files that end in ``suffix``.

    ``graph``: a file holds operators beside its tensors.
    """

    suffix: str
    read_tensors: Reference
    graph: bool = True

    def read(self, file: Path, root: Path) -> list[StoredTensor]:
        """The tensors of ``file``, whose paths may be others beside it. Raises `ModelError`."""
        read_tensors: Callable[[Path, Path], list[StoredTensor]] = load(self.read_tensors)
        return read_tensors(file, root)


READERS = {
    spec.name: TensorReader(spec.tensors_suffix or spec.suffix, spec.tensors, spec.has_graph)
    for spec in FORMATS.values()
    if spec.tensors is not None
}
"""Format -> its reader, in the order in which a folder is searched."""


@dataclass(frozen=True)
class Contents:
    """A model's tensors, the files that hold them, and every file that belongs to the model."""

    format: str
    tensors: tuple[StoredTensor, ...]
    weight_files: tuple[Path, ...]
    files: tuple[Path, ...]


def read_model(path: Path) -> Contents:
    """The tensors of a file or folder; tensors that share bytes are counted once. Raises `ModelError`."""
    if not path.exists():
        raise ModelError("There is no such file or folder.", where=str(path), hint="Check the path.")
    try:
        return _read(path, *_weights(path))
    except OSError as error:
        raise unreadable(error, path) from error


def _read(path: Path, form: str, weights: tuple[Path, ...]) -> Contents:
    root = path if path.is_dir() else path.parent
    tensors = _counted_once([tensor for file in weights for tensor in _of_part(form, file, root)], root)
    held = (*weights, *sorted({tensor.path for tensor in tensors}.difference(weights)))
    files = tuple(sorted(item for item in path.rglob("*") if item.is_file())) if path.is_dir() else held
    return Contents(form, tensors, held, files)


def _of_part(form: str, file: Path, root: Path) -> list[StoredTensor]:
    """The tensors of a file; those of a pipeline's part have its name before theirs."""
    tensors = READERS[form].read(file, root)
    if not is_pipeline(root) or file.parent == root:
        return tensors
    part = file.relative_to(root).parts[0].removesuffix("_decoder")
    return [
        one if one.name.startswith(f"{part}.") else one.model_copy(update={"name": f"{part}.{one.name}"})
        for one in tensors
    ]


def _weights(path: Path) -> tuple[str, tuple[Path, ...]]:
    suffixes = {reader.suffix: form for form, reader in READERS.items()}
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise pickle_refusal(path)
        if suffix not in suffixes:
            raise ModelError(
                f"{path.name} is of no kind that can be inspected.",
                where=str(path),
                expected=f"a model folder or a file ending in {', '.join(suffixes)}",
                hint="Name the file that holds the weights.",
            )
        return suffixes[suffix], (path,)
    graphs = is_pipeline(path) and any(path.glob("*/*.onnx"))
    if (path / "model.safetensors").is_file() or (path / INDEX).is_file() or (is_pipeline(path) and not graphs):
        return "safetensors", weight_files(path)
    # A sentence encoder in any format has modules beside it whose weights are safetensors.
    for suffix, form in sorted(suffixes.items(), key=lambda one: one[1] == "safetensors"):
        beside = FORMATS[form].beside
        files = tuple(sorted(one for one in path.rglob(f"*{suffix}") if one.is_file() and one.name not in beside))
        if files:
            return form, files
    weight_files(path)  # raises: a pickle, an adapter, or nothing at all
    raise AssertionError("a folder without weights is refused above")


def _counted_once(tensors: list[StoredTensor], root: Path) -> tuple[StoredTensor, ...]:
    """Tensors at one place of an external file are one: the first keeps the bytes, the others point to it."""
    first: dict[str, str] = {}
    counted = []
    for tensor in tensors:
        place, owner = tensor.tied_to, first.get(tensor.tied_to or "")
        if place is not None and owner is None:
            first[place] = tensor.name
        update: dict[str, object] = {"tied_to": owner, "file": _relative(tensor.path, root)}
        counted.append(tensor.model_copy(update=update | ({"bytes": 0, "parameters": 0} if owner else {})))
    return tuple(counted)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
