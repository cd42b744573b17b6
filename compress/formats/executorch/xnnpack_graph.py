"""Graph of one XNNPACK delegate of a program: its values, and the same graph with more outputs.

ExecuTorch's own `flatc` and schema read and write it (backends/xnnpack/serialization/schema.fbs).
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NONE = 2**32 - 1
"""Id of an absent operand."""
_MAGIC = b"XH00"
_INPUT, _OUTPUT = 1, 2
_INFINITY = re.compile(r"(?<=: )(-?)inf(?=\s*[,}\]])")
_TYPES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32", "qint32": "int32", "qcint32": "int32",
    "qint8": "int8", "quint8": "uint8", "qcint8": "int8", "qdint8": "int8", "qpint8": "int8", "qcint4": "int4",
    "qbint4": "int4",
}  # fmt: skip
"""numpy types of `XNNDatatype`: quantized per tensor, channel or block, or in each call."""
_BITS = {"int4": 4, "int8": 8, "uint8": 8, "float16": 16, "bfloat16": 16}


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


@dataclass(frozen=True)
class XnnNode:
    """Node of a delegate; ``kind`` is the schema's name without the prefix `XNN`."""

    kind: str
    reads: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class XnnGraph:
    """Graph of a delegate: ``content`` as the schema describes it, and ``payload``, all bytes of the delegate."""

    content: Mapping[str, Any]
    payload: bytes

    @property
    def values(self) -> dict[int, Any]:
        """Values by their ids."""
        return {value["id_out"]: value for value in map(_tensor, self.content["xvalues"])}

    @property
    def nodes(self) -> Iterator[XnnNode]:
        """Nodes in execution order."""
        for node in self.content["xnodes"]:
            ids = {key: value for key, value in node["xnode_union"].items() if key.endswith("_id") and value != NONE}
            outputs = tuple(value for key, value in ids.items() if key.startswith("output"))
            reads = tuple(value for key, value in ids.items() if not key.startswith("output"))
            yield XnnNode(node["xnode_union_type"].removeprefix("XNN"), reads, outputs)

    @property
    def constants(self) -> Iterator[XnnConstant]:
        """Weights and the scales that belong to them."""
        keys = [data.get("named_key", "") for data in self.content["constant_data"]]
        for index, value in enumerate(self.content["xvalues"]):
            tensor, quantized = _tensor(value), value["xvalue_union"].get("quant_params", {})
            if tensor["constant_buffer_idx"]:
                key, shape = keys[tensor["constant_buffer_idx"]], tuple(tensor.get("dims", ()))
                yield XnnConstant(key, f"{index}", _type(tensor), shape)
                if scales := quantized.get("scale_buffer_idx"):
                    yield XnnConstant(keys[scales], f"{index}.scale", "float32", (), scale=True)

    @property
    def externals(self) -> tuple[list[int], list[int]]:
        """Inputs and outputs, in the order in which a program passes them."""
        external = sorted(
            (value["external_id"], name, value["flags"]) for name, value in self.values.items() if value["flags"]
        )
        return tuple([name for _, name, flags in external if flags == flag] for flag in (_INPUT, _OUTPUT))  # type: ignore[return-value]

    def bits(self, value: int) -> int:
        """Return the bits of a number of a value; 32 for floats."""
        return _BITS.get(_type(self.values[value]), 32)

    def is_float(self, value: int) -> bool:
        """Return whether a value consists of floats and is no constant."""
        tensor = self.values[value]
        return _type(tensor) == "float32" and not tensor["constant_buffer_idx"]

    def with_outputs(self, outputs: Sequence[int]) -> bytes:
        """Return the bytes of a delegate that also returns ``outputs``, after its previous outputs."""
        content = copy.deepcopy(dict(self.content))
        tensors = {tensor["id_out"]: tensor for tensor in map(_tensor, content["xvalues"])}
        for value in outputs:
            tensors[value].update(external_id=content["num_externs"], flags=_OUTPUT)
            content["num_externs"] += 1
            content["output_ids"].append(value)
        # The bytes of a graph with the constants that ``payload`` contains.
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
        from executorch.exir._serialize._flatbuffer import _flatc_compile

        with tempfile.TemporaryDirectory() as folder:
            json_file = Path(folder) / "graph.json"
            json_file.write_text(json.dumps(content))
            _flatc_compile(folder, _schema(folder), str(json_file))
            flatbuffer = json_file.with_suffix(".bin").read_bytes()
        previous_header = XNNHeader.from_bytes(self.payload[: XNNHeader.EXPECTED_LENGTH])
        constants = self.payload[previous_header.constant_data_offset :][: previous_header.constant_data_size]
        start = previous_header.flatbuffer_offset
        # The constants follow at a multiple of 16 bytes.
        end = -(-(start + len(flatbuffer)) // 16) * 16
        header = XNNHeader(start, len(flatbuffer), end, previous_header.constant_data_size).to_bytes()
        return b"".join([header.ljust(start, b"\0"), flatbuffer.ljust(end - start, b"\0"), constants])


def _tensor(value: Mapping[str, Any]) -> Any:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def _type(tensor: Mapping[str, Any]) -> str:
    return _TYPES.get(tensor["datatype"].removeprefix("xnn_datatype_"), "?")


def read_graph(payload: bytes) -> XnnGraph:
    """Parse the bytes of a delegate; raise `ValueError` if they are invalid."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    if payload[4:8] != _MAGIC:
        raise ValueError("an XNNPACK delegate has no header")
    # The header contains the offset and size of the flatbuffer.
    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "graph.bin"
        binary.write_bytes(payload[start : start + size])
        try:
            _flatc_decompile(folder, _schema(folder), str(binary), ["--raw-binary"])
        except subprocess.CalledProcessError as error:
            raise ValueError(f"an XNNPACK delegate cannot be read: {error}") from error
        # flatc writes an activation's bounds as inf, which Python's JSON calls Infinity.
        text = _INFINITY.sub(r"\1Infinity", binary.with_suffix(".json").read_text())
        return XnnGraph(json.loads(text), payload)


def _schema(folder: str) -> str:
    """Write the schema into a folder and return its path."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes

    file = Path(folder) / "schema.fbs"
    file.write_bytes(_get_schema_bytes())
    return str(file)
