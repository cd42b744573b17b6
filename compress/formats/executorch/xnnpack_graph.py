"""One part of a program that XNNPACK runs: what its values are, and the same part with more outputs.

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
"""The id of what a node does without."""
_MAGIC = b"XH00"
_INPUT, _OUTPUT = 1, 2
_INFINITY = re.compile(r"(?<=: )(-?)inf(?=\s*[,}\]])")
_TYPES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32", "qint32": "int32", "qcint32": "int32",
    "qint8": "int8", "quint8": "uint8", "qcint8": "int8", "qdint8": "int8", "qpint8": "int8", "qcint4": "int4",
    "qbint4": "int4",
}  # fmt: skip
"""`XNNDatatype`: quantized with one scale for all, one a channel or one a block, or in each call."""
_BITS = {"int4": 4, "int8": 8, "uint8": 8, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class XnnConstant:
    """``key`` finds its bytes among the program's named data; ``value`` is its place among the graph's values."""

    key: str
    value: str
    dtype: str
    shape: tuple[int, ...]
    scale: bool = False


@dataclass(frozen=True)
class XnnNode:
    """``kind`` as the schema names it, without its `XNN`."""

    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class XnnGraph:
    """``told`` is the graph as the schema has it; ``payload`` all bytes of the part."""

    told: Mapping[str, Any]
    payload: bytes

    @property
    def values(self) -> dict[int, Any]:
        """Each value by its id."""
        return {one["id_out"]: one for one in map(_tensor, self.told["xvalues"])}

    @property
    def nodes(self) -> Iterator[XnnNode]:
        """In the order in which they run."""
        for one in self.told["xnodes"]:
            ids = {key: value for key, value in one["xnode_union"].items() if key.endswith("_id") and value != NONE}
            makes = tuple(value for key, value in ids.items() if key.startswith("output"))
            reads = tuple(value for key, value in ids.items() if not key.startswith("output"))
            yield XnnNode(one["xnode_union_type"].removeprefix("XNN"), reads, makes)

    @property
    def constants(self) -> Iterator[XnnConstant]:
        """Weights, and the scales that belong to them."""
        keys = [one.get("named_key", "") for one in self.told["constant_data"]]
        for place, value in enumerate(self.told["xvalues"]):
            tensor, quantized = _tensor(value), value["xvalue_union"].get("quant_params", {})
            if tensor["constant_buffer_idx"]:
                key, shape = keys[tensor["constant_buffer_idx"]], tuple(tensor.get("dims", ()))
                yield XnnConstant(key, f"{place}", _type(tensor), shape)
                if scales := quantized.get("scale_buffer_idx"):
                    yield XnnConstant(keys[scales], f"{place}.scale", "float32", (), scale=True)

    @property
    def externals(self) -> tuple[list[int], list[int]]:
        """Inputs and outputs, in the order in which a program gives them."""
        external = sorted((one["external_id"], name, one["flags"]) for name, one in self.values.items() if one["flags"])
        return tuple([name for _, name, flags in external if flags == flag] for flag in (_INPUT, _OUTPUT))  # type: ignore[return-value]

    def bits(self, value: int) -> int:
        """Of a number of that value: 32 for floats."""
        return _BITS.get(_type(self.values[value]), 32)

    def is_float(self, value: int) -> bool:
        """Whether it is made of floats, and no constant."""
        one = self.values[value]
        return _type(one) == "float32" and not one["constant_buffer_idx"]

    def with_outputs(self, outputs: Sequence[int]) -> bytes:
        """The bytes of a part that gives ``outputs`` too, behind what it gave; its constants are those that it had."""
        told = copy.deepcopy(dict(self.told))
        tensors = {one["id_out"]: one for one in map(_tensor, told["xvalues"])}
        for value in outputs:
            tensors[value].update(external_id=told["num_externs"], flags=_OUTPUT)
            told["num_externs"] += 1
            told["output_ids"].append(value)
        return _written(told, self.payload)


def _tensor(value: Mapping[str, Any]) -> Any:
    held = value["xvalue_union"]
    return held.get("tensor_value", held)


def _type(tensor: Mapping[str, Any]) -> str:
    return _TYPES.get(tensor["datatype"].removeprefix("xnn_datatype_"), "?")


def read_graph(payload: bytes) -> XnnGraph:
    """What the bytes of a part tell. Raises `ValueError` for something else."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    if payload[4:8] != _MAGIC:
        raise ValueError("a part of XNNPACK has no header")
    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "graph.bin"
        made.write_bytes(payload[start : start + size])
        try:
            _flatc_decompile(folder, _schema(folder), str(made), ["--raw-binary"])
        except subprocess.CalledProcessError as error:
            raise ValueError(f"a part of XNNPACK cannot be read: {error}") from error
        # flatc writes an activation's bounds as inf, which Python's JSON calls Infinity.
        told = _INFINITY.sub(r"\1Infinity", made.with_suffix(".json").read_text())
        return XnnGraph(json.loads(told), payload)


def _written(told: Mapping[str, Any], payload: bytes) -> bytes:
    """The graph ``told`` with the constants that lie in ``payload``."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_compile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "graph.json"
        place.write_text(json.dumps(told))
        _flatc_compile(folder, _schema(folder), str(place))
        made = place.with_suffix(".bin").read_bytes()
    before = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    constants = payload[before.constant_data_offset :][: before.constant_data_size]
    start = before.flatbuffer_offset
    end = -(-(start + len(made)) // 16) * 16
    header = XNNHeader(start, len(made), end, before.constant_data_size).to_bytes()
    return b"".join([header.ljust(start, b"\0"), made.ljust(end - start, b"\0"), constants])


def _schema(folder: str) -> str:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes

    place = Path(folder) / "schema.fbs"
    place.write_bytes(_get_schema_bytes())
    return str(place)
