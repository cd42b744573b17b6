"""Constants of one XNNPACK delegate of a program.

ExecuTorch's own `flatc` and schema read the graph (backends/xnnpack/serialization/schema.fbs).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b"XH00"
_INFINITY = re.compile(r"(?<=: )(-?)inf(?=\s*[,}\]])")
_TYPES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32", "qint32": "int32", "qcint32": "int32",
    "qint8": "int8", "quint8": "uint8", "qcint8": "int8", "qdint8": "int8", "qpint8": "int8", "qcint4": "int4",
    "qbint4": "int4",
}  # fmt: skip
"""numpy types of `XNNDatatype`: quantized per tensor, channel or block, or in each call."""


@dataclass(frozen=True)
class XnnConstant:
    """Constant of a delegate.

    Attributes:
        key: Key of its bytes among the program's named data.
        value: Index among the graph's values.
        dtype: numpy type.
        shape: Shape, empty for scales.
        scale: Whether the constant is a scale.
    """

    key: str
    value: str
    dtype: str
    shape: tuple[int, ...]
    scale: bool = False


def read_constants(payload: bytes) -> Iterator[XnnConstant]:
    """Yield the weights in the bytes of a delegate, and the scales that belong to them; raise `ValueError`."""
    graph = _read_graph(payload)
    keys = [data.get("named_key", "") for data in graph["constant_data"]]
    for index, value in enumerate(graph["xvalues"]):
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        if tensor["constant_buffer_idx"]:
            key, shape = keys[tensor["constant_buffer_idx"]], tuple(tensor.get("dims", ()))
            dtype = _TYPES.get(tensor["datatype"].removeprefix("xnn_datatype_"), "?")
            yield XnnConstant(key, f"{index}", dtype, shape)
            if scales := union.get("quant_params", {}).get("scale_buffer_idx"):
                yield XnnConstant(keys[scales], f"{index}.scale", "float32", (), scale=True)


def _read_graph(payload: bytes) -> Any:
    """Return the graph of a delegate as ExecuTorch's schema describes it; raise `ValueError` for invalid bytes."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    if payload[4:8] != _MAGIC:
        raise ValueError("an XNNPACK delegate has no header")
    # The header contains the offset and size of the flatbuffer.
    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(payload[start : start + size])
        try:
            _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        except subprocess.CalledProcessError as error:
            raise ValueError(f"an XNNPACK delegate cannot be read: {error}") from error
        # flatc writes an activation's bounds as inf, which Python's JSON calls Infinity.
        text = _INFINITY.sub(r"\1Infinity", binary.with_suffix(".json").read_text())
        return json.loads(text)
