"""The tensors of a model folder or file, from headers alone: safetensors, GGUF, ONNX, and others of runtimes."""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

from compress.checkpoints.checks import INDEX, PICKLE_SUFFIXES, pickle_refusal, read_json, unreadable, weight_files
from compress.checkpoints.safetensors_file import StoredTensor, read_header
from compress.errors import ModelError
from compress.formats.coreml.file import MilConstant, read_coreml
from compress.formats.coreml.model import weights_of as weights_of_coreml
from compress.formats.executorch.file import read_pte
from compress.formats.gguf.file import read_gguf
from compress.formats.litert.file import LiteRtTensor, read_litert
from compress.formats.onnx.graph import Initializer, read_graph
from compress.formats.onnx.names import Meaning, explain
from compress.formats.openvino.ir import IrConstant, read_ir
from compress.formats.openvino.model import weights_of
from compress.formats.ort.graph import read_ort_graph
from compress.formats.tensor import Contents, Format, TensorInfo

SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".onnx": "onnx",
    ".ort": "ort",
    ".xml": "openvino",
    ".pte": "executorch",
    ".tflite": "litert",
    ".mlmodel": "coreml",
}
_IR_COMPANIONS = ("/zero_point", "/scale")
_PACKED_COMPANIONS = (".qzeros", ".scales", ".g_idx")


def read_model(path: Path) -> Contents:
    """The tensors of a file or folder; tensors that share bytes are counted once. Raises `ModelError`."""
    if not path.exists():
        raise ModelError("There is no such file or folder.", where=str(path), mend="Check the path.")
    try:
        return _read(path, *_weights(path))
    except OSError as error:
        raise unreadable(error, path) from error


def _read(path: Path, form: Format, weights: tuple[Path, ...]) -> Contents:
    root = path if path.is_dir() else path.parent
    tensors: list[TensorInfo] = []
    external: set[Path] = set()
    for file in weights:
        if form == "safetensors":
            tensors += _safetensors(file, root)
        elif form == "gguf":
            tensors += _gguf(file, root)
        elif form == "ort":
            tensors += _ort(file, root)
        elif form == "openvino":
            tensors += _openvino(file, root)
            external.add(weights_of(file))
        elif form == "executorch":
            tensors += _executorch(file, root)
        elif form == "litert":
            tensors += [_of_litert(one, file, root) for one in read_litert(file.read_bytes(), file).tensors]
        elif form == "coreml":
            weights_file = weights_of_coreml(file)
            program = read_coreml(file.read_bytes(), weights_file.read_bytes(), file)
            tensors += [_of_coreml(one, weights_file, root) for one in program.constants]
            external.add(weights_file)
        else:
            found, used = _onnx(file, root)
            tensors += found
            external |= used
    tensors = _counted_once(tensors)
    held = (*weights, *sorted(external))
    files = tuple(sorted(item for item in path.rglob("*") if item.is_file())) if path.is_dir() else held
    return Contents(form, tuple(tensors), held, files)


def _weights(path: Path) -> tuple[Format, tuple[Path, ...]]:
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise pickle_refusal(path)
        if suffix not in SUFFIXES:
            raise ModelError(
                f"{path.name} is of no kind that can be inspected.",
                where=str(path),
                expected=f"a model folder or a file ending in {', '.join(SUFFIXES)}",
                mend="Name the file that holds the weights.",
            )
        return SUFFIXES[suffix], (path,)
    if (path / "model.safetensors").is_file() or (path / INDEX).is_file():
        return "safetensors", weight_files(path)
    for suffix, form in SUFFIXES.items():
        files = tuple(sorted(item for item in path.rglob(f"*{suffix}") if item.is_file()))
        if files:
            return form, files
    weight_files(path)  # raises: a pickle, an adapter, or nothing at all
    raise AssertionError("a folder without weights is refused above")


def _safetensors(file: Path, root: Path) -> list[TensorInfo]:
    quantization = _quantization(root)
    return [_stored(tensor, root, _packed_bits(tensor.name, quantization)) for tensor in read_header(file)]


def _quantization(root: Path) -> dict[str, Any]:
    """What the folder's config says of a GPTQ or AWQ checkpoint; empty for any other."""
    if not (root / "config.json").is_file():
        return {}
    found = read_json(root / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def _packed_bits(name: str, quantization: dict[str, Any]) -> int | None:
    """The bits of the weights that `NAME.qweight` packs into int32: those of its layer where layers differ."""
    bits = quantization.get("bits")
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name.rpartition(".")[0]):
            bits = changes.get("bits", bits)
            break
    return bits if isinstance(bits, int) and bits > 0 else None


def _stored(tensor: StoredTensor, root: Path, bits: int | None) -> TensorInfo:
    packed = bits is not None and tensor.name.endswith(".qweight") and tensor.dtype == "int32"
    companion = bits is not None and tensor.name.endswith(_PACKED_COMPANIONS)
    constant = tensor.dtype in ("int64", "int32", "bool", "uint64") and not packed
    parameters = 0 if companion or constant else tensor.elements
    return TensorInfo(
        name=tensor.name,
        shape=tensor.shape,
        dtype=f"int{bits}" if packed else tensor.dtype,
        parameters=tensor.elements * 32 // bits if packed and bits else parameters,
        bytes=tensor.bytes,
        origin=tensor.name,
        role="quantization" if companion else "constant" if constant else "weight",
        file=_relative(tensor.file, root),
        path=tensor.file,
        start=tensor.start,
        stored_bytes=tensor.bytes,
        packed=packed,
    )


def _gguf(file: Path, root: Path) -> list[TensorInfo]:
    return [
        TensorInfo(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            parameters=math.prod(tensor.shape),
            bytes=tensor.bytes,
            origin=tensor.name,
            file=_relative(file, root),
            path=file,
            start=tensor.start,
            stored_bytes=tensor.bytes,
        )
        for tensor in read_gguf(file).tensors
    ]


def _ort(file: Path, root: Path) -> list[TensorInfo]:
    graph = read_ort_graph(file)
    named = zip(graph.initializers, explain(graph), strict=True)
    return [_initializer(item, meaning, file, root, None) for item, meaning in named]


def _openvino(file: Path, root: Path) -> list[TensorInfo]:
    weights = weights_of(file)
    return [_constant(one, weights, root) for one in read_ir(file.read_bytes(), file, weights.stat().st_size)]


def _constant(one: IrConstant, weights: Path, root: Path) -> TensorInfo:
    companion = one.name.endswith(_IR_COMPANIONS)
    constant = not one.shape or one.dtype in ("int64", "int32", "bool")
    return TensorInfo(
        name=one.name,
        shape=one.shape,
        dtype=one.dtype,
        parameters=0 if companion or constant else math.prod(one.shape),
        bytes=one.bytes,
        origin=one.name,
        role="quantization" if companion else "constant" if constant else "weight",
        file=_relative(weights, root),
        path=weights,
        start=one.start,
        stored_bytes=one.bytes,
    )


def _executorch(file: Path, root: Path) -> list[TensorInfo]:
    return [
        TensorInfo(
            name=one.name,
            shape=one.shape,
            dtype=one.dtype,
            parameters=one.weights,
            bytes=one.bytes,
            origin=one.name,
            role="quantization" if one.scale else "weight" if one.weights else "constant",
            file=_relative(file, root),
            path=file,
            start=one.start,
            stored_bytes=one.bytes,
            packed=one.weights > math.prod(one.shape),
        )
        for one in read_pte(file.read_bytes(), file)
    ]


def _of_litert(one: LiteRtTensor, file: Path, root: Path) -> TensorInfo:
    constant = not one.shape or one.dtype in ("int64", "int32", "bool")
    return TensorInfo(
        name=one.name,
        shape=one.shape,
        dtype=one.dtype,
        parameters=0 if one.scales or constant else math.prod(one.shape),
        bytes=one.bytes,
        origin=one.name,
        role="quantization" if one.scales else "constant" if constant else "weight",
        file=_relative(file, root),
        path=file,
        start=one.start,
        stored_bytes=one.bytes,
        packed=one.dtype in ("int4", "int2"),
    )


def _of_coreml(one: MilConstant, weights: Path, root: Path) -> TensorInfo:
    constant = not one.shape or one.dtype in ("int32", "int16", "uint16", "bool")
    return TensorInfo(
        name=one.name,
        shape=one.shape,
        dtype=one.dtype,
        parameters=0 if one.scale or constant else math.prod(one.shape),
        bytes=one.bytes,
        origin=one.name,
        role="quantization" if one.scale else "constant" if constant else "weight",
        file=_relative(weights, root),
        path=weights,
        start=one.start,
        stored_bytes=one.bytes,
        packed=one.dtype == "int4",
    )


def _onnx(file: Path, root: Path) -> tuple[list[TensorInfo], set[Path]]:
    graph = read_graph(file)
    found: list[TensorInfo] = []
    used: set[Path] = set()
    for item, meaning in zip(graph.initializers, explain(graph), strict=True):
        data = _external(item, file) if item.external else None
        used |= {data[0]} if data else set()
        found.append(_initializer(item, meaning, file, root, data))
    return found, used


def _initializer(
    item: Initializer, meaning: Meaning, file: Path, root: Path, data: tuple[Path, int, int] | None
) -> TensorInfo:
    place, start, length = data or (file, item.start, item.stop - item.start)
    return TensorInfo(
        name=meaning.name,
        shape=item.shape,
        dtype=meaning.dtype,
        parameters=meaning.parameters,
        bytes=length if data else item.bytes,
        origin=item.name,
        role=meaning.role,
        file=_relative(place, root),
        path=file,
        start=item.start,
        stored_bytes=item.stop - item.start,
        packed=meaning.packed,
        tied_to=f"{place}:{start}" if data else None,
    )


def _external(item: Initializer, file: Path) -> tuple[Path, int, int]:
    """File, offset and length of a tensor outside its graph. Raises `ModelError` when they can't be right."""
    location = item.external.get("location", "")
    pure = PurePosixPath(location)
    path = file.parent / location
    inside = path.resolve().is_relative_to(file.parent.resolve())
    if not location or pure.is_absolute() or ".." in pure.parts or not inside:
        raise ModelError(
            f"The tensor {item.name!r} names {location!r} as its file, which lies outside the model folder.",
            where=str(file),
            expected="external data beside the ONNX file",
            mend="Save the model again with its data beside it.",
        )
    if not path.is_file():
        raise ModelError(
            f"The file {location!r} with the weights is missing.",
            where=str(file),
            expected=f"{location} beside it",
            mend="Copy the data file along with the ONNX file.",
        )
    return _external_span(item, path)


def _external_span(item: Initializer, path: Path) -> tuple[Path, int, int]:
    size = path.stat().st_size
    try:
        offset = int(item.external.get("offset") or 0)
        length = int(item.external.get("length") or size - offset)
    except ValueError as error:
        raise ModelError(
            f"The place of {item.name!r} in its file is {item.external!r}.",
            where=str(path),
            expected="numbers",
        ) from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"The external data is truncated: {item.name!r} ends at byte {offset + length} of {size}.",
            where=str(path),
            mend="Fetch, copy or export the model again.",
        )
    return path, offset, length


def _counted_once(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Tensors at one place of an external file are one: the first keeps the bytes, the others point to it."""
    first: dict[str, str] = {}
    counted = []
    for tensor in tensors:
        place, owner = tensor.tied_to, first.get(tensor.tied_to or "")
        if place is not None and owner is None:
            first[place] = tensor.name
        update: dict[str, object] = {"tied_to": owner}
        counted.append(tensor.model_copy(update=update | ({"bytes": 0, "parameters": 0} if owner else {})))
    return counted


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
