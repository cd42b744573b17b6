"""LiteRT file (`.tflite`) as a folder, and reader of its tensors. Importing this imports no ai_edge_litert."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.formats.model_file import FileModel
from compress.models.stored_tensor import Content, StoredTensor, infer_role, stored
from compress.utils.errors import ModelError, install_command

# Recipes load this module, and `compress recipes` must not wait for NumPy.
if TYPE_CHECKING:
    import numpy as np


LITERT_FILE = "model.tflite"
Precision = Literal["fp32", "fp16", "int8", "int8_weights"]
"""Type of the weights; in int8 products are computed in 8 bits, too."""
Blocks = Literal[32, 64, 128, 256]
"""Weights of a table's row that share a scale."""

_IDENTIFIER = b"TFL3"
_BITS = {"int4": 4, "uint4": 4, "int2": 2}


class LiteRtModel(FileModel):
    """File that contains its signatures and weights."""

    kind = "litert"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        read_litert(file.read_bytes(), file)
        return (file,)


def read_litert(content: Content, file: Path) -> list[StoredTensor]:
    """Return the tensors in the ``content`` of a file.

    Raises:
        ModelError: The file is truncated or of another kind, or the package with its schema is missing.
    """
    if content[4:8] != _IDENTIFIER:
        raise ModelError(f"{file.name} is not in LiteRT's format.", where=str(file), expected="a whole .tflite file")
    try:
        from ai_edge_litert.schema_py_generated import Model
    except ImportError as error:
        raise ModelError(
            f"{file.name} cannot be read without the package that has its schema.",
            where=str(file),
            hint=install_command("litert"),
        ) from error
    try:
        # The tensors in file order, with numbers added to names that occur more than once.
        tensors = list(_tensors(Model.GetRootAs(content, 0), content, file))
        counts = Counter(tensor.name for tensor in tensors)
        seen: Counter[str] = Counter()
        for index, tensor in enumerate(tensors):
            if counts[tensor.name] > 1:
                seen[tensor.name] += 1
                name = f"{tensor.name}#{seen[tensor.name]}"
                tensors[index] = tensor.model_copy(update={"name": name, "origin": name})
        return tensors
    except (struct.error, AttributeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ModelError(
            f"{file.name} is cut or broken: {error}",
            where=str(file),
            hint="copy it again, or write it again with the stage litert",
        ) from error


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the tensors of a file."""
    return read_litert(file.read_bytes(), file)


def _tensors(model: Any, content: Content, file: Path) -> Iterator[StoredTensor]:
    """Yield the stored tensors of every graph; a shared buffer is listed once, under its first name."""
    import numpy as np
    from ai_edge_litert.schema_py_generated import TensorType

    types = {number: name.lower() for name, number in vars(TensorType).items() if isinstance(number, int)}
    seen: set[int] = set()
    for graph in (model.Subgraphs(index) for index in range(model.SubgraphsLength())):
        graph_tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
        scale_indices = {_scale_index(tensor.Quantization()) for tensor in graph_tensors}
        for index, tensor in enumerate(graph_tensors):
            span = _buffer_span(model, tensor.Buffer(), content)
            if span is None or tensor.Buffer() in seen:
                continue
            seen.add(tensor.Buffer())
            shape = tuple(tensor.Shape(axis) for axis in range(tensor.ShapeLength()))
            name, dtype = tensor.Name().decode(), types[tensor.Type()]
            elements = int(np.prod(shape, dtype=np.int64))
            bits = _BITS.get(dtype) or (8 * np.dtype(dtype).itemsize if dtype not in ("string", "bfloat16") else None)
            if bits is not None and span[1] != -(-elements * bits // 8):
                raise ValueError(f"{name!r}, {list(shape)} of {dtype}, has {span[1]} bytes")
            role = infer_role(dtype, shape, index in scale_indices)
            yield stored(name, dtype, shape, file, span, role, packed=dtype in _BITS)
            # The scales of a quantized tensor are stored in the tensor table itself.
            quantization = tensor.Quantization()
            if quantization is not None and quantization.ScaleLength():
                count = quantization.ScaleLength()
                start = _start(quantization.ScaleAsNumpy(), content)
                yield stored(f"{name}/scale", "float32", (count,), file, (start, 4 * count), "quantization")


def _buffer_span(model: Any, index: int, content: Content) -> tuple[int, int] | None:
    """Return the first byte and the size of a buffer, or ``None`` if it is empty.

    Raises:
        ValueError: The buffer ends beyond the file.
    """
    buffer = model.Buffers(index)
    # Files above 2 GB store their buffers behind the tables.
    if buffer.Size():
        start, size = buffer.Offset(), buffer.Size()
    elif buffer.DataLength():
        start, size = _start(buffer.DataAsNumpy(), content), buffer.DataLength()
    else:
        return None
    if start + size > len(content):
        raise ValueError(f"the buffer {index} ends at byte {start + size} of {len(content)}")
    return start, size


def _scale_index(quantization: Any) -> int | None:
    """Return the index of the tensor that scales the blocks of another one, or None without blocks."""
    from ai_edge_litert.schema_py_generated import BlockwiseQuantization, QuantizationDetails

    if quantization is None or quantization.DetailsType() != QuantizationDetails.BlockwiseQuantization:
        return None
    details, table = BlockwiseQuantization(), quantization.Details()
    details.Init(table.Bytes, table.Pos)
    return int(details.Scales())


def _start(view: np.ndarray, content: Content) -> int:
    """Return the offset in ``content`` of an array that is a view of it."""
    import numpy as np

    origin = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    return int(view.__array_interface__["data"][0] - origin)
