"""One part of a program that XNNPACK runs, read whole and written again with more inputs and outputs.

ExecuTorch's own `flatc` and schema read and write it (backends/xnnpack/serialization/schema.fbs).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NONE = 2**32 - 1
"""The id of what a node does without."""
_INPUT, _OUTPUT = 1, 2
_BITS = {
    "qint8": 8,
    "quint8": 8,
    "qcint8": 8,
    "qdint8": 8,
    "qpint8": 8,
    "qcint4": 4,
    "qbint4": 4,
    "fp16": 16,
    "bf16": 16,
}


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
    def values(self) -> dict[int, Mapping[str, Any]]:
        """Each value by its id."""
        found = (_tensor(one) for one in self.told["xvalues"])
        return {one["id_out"]: one for one in found}

    @property
    def nodes(self) -> Iterator[XnnNode]:
        """In the order in which they run."""
        for one in self.told["xnodes"]:
            ids = {key: value for key, value in one["xnode_union"].items() if key.endswith("_id") and value != NONE}
            makes = tuple(value for key, value in ids.items() if key.startswith("output"))
            reads = tuple(value for key, value in ids.items() if not key.startswith("output"))
            yield XnnNode(one["xnode_union_type"].removeprefix("XNN"), reads, makes)

    @property
    def externals(self) -> tuple[list[int], list[int]]:
        """Inputs and outputs, in the order in which a program gives them."""
        external = sorted((one["external_id"], name, one["flags"]) for name, one in self.values.items() if one["flags"])
        return tuple([name for _, name, flags in external if flags == flag] for flag in (_INPUT, _OUTPUT))  # type: ignore[return-value]

    def bits(self, value: int) -> int:
        """Of a number of that value: 32 for floats."""
        return _BITS.get(self.values[value]["datatype"].removeprefix("xnn_datatype_"), 32)

    def is_float(self, value: int) -> bool:
        """Whether it is made of floats, and no constant."""
        one = self.values[value]
        return one["datatype"] == "xnn_datatype_fp32" and not one["constant_buffer_idx"]

    def with_externals(self, outputs: Sequence[int], given: Sequence[int]) -> XnnGraph:
        """The same graph that gives ``outputs`` too, and reads ``given`` from outside, behind what it gave and read."""
        told = copy.deepcopy(dict(self.told))
        tensors = {one["id_out"]: one for one in map(_tensor, told["xvalues"])}
        free = max(tensors) + 1
        for at, value in enumerate(given):
            made = {**tensors[value], "id_out": free + at, "external_id": told["num_externs"], "flags": _INPUT}
            told["xvalues"].append({"xvalue_union_type": "XNNTensorValue", "xvalue_union": made})
            told["num_externs"] += 1
            told["input_ids"].append(free + at)
            for node in told["xnodes"]:
                fields = node["xnode_union"]
                read = [key for key in fields if key.endswith("_id") and not key.startswith("output")]
                fields.update({key: free + at for key in read if fields[key] == value})
        for value in outputs:
            tensors[value].update(external_id=told["num_externs"], flags=_OUTPUT)
            told["num_externs"] += 1
            told["output_ids"].append(value)
        return XnnGraph(told, self.payload)


def _tensor(value: Mapping[str, Any]) -> Any:
    held = value["xvalue_union"]
    return held.get("tensor_value", held)


def read_graph(payload: bytes) -> XnnGraph:
    """What the bytes of a part tell."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        schema = _schema(place)
        (place / "graph.bin").write_bytes(payload[start : start + size])
        _flatc_decompile(folder, str(schema), str(place / "graph.bin"), ["--raw-binary"])
        return XnnGraph(json.loads((place / "graph.json").read_text()), payload)


def write_graph(graph: XnnGraph) -> bytes:
    """The bytes of a part; its constants are those that lay with it."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_compile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        schema = _schema(place)
        (place / "graph.json").write_text(json.dumps(graph.told))
        _flatc_compile(folder, str(schema), str(place / "graph.json"))
        made = (place / "graph.bin").read_bytes()
    before = XNNHeader.from_bytes(graph.payload[: XNNHeader.EXPECTED_LENGTH])
    constants = graph.payload[before.constant_data_offset :][: before.constant_data_size]
    start = before.flatbuffer_offset
    end = -(-(start + len(made)) // 16) * 16
    header = XNNHeader(start, len(made), end, before.constant_data_size).to_bytes()
    return b"".join([header.ljust(start, b"\0"), made.ljust(end - start, b"\0"), constants])


def _schema(folder: Path) -> Path:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes

    (folder / "schema.fbs").write_bytes(_get_schema_bytes())
    return folder / "schema.fbs"
