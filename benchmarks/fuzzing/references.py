"""Differential fuzzing: what our readers accept is read by the packages gguf, onnx and safetensors too.

A difference is a failure, except that onnx refuses messages that our reader steps over (docs/security.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def _differs(what: str) -> Exception:
    from fuzzing.targets import BrokenPromiseError

    return BrokenPromiseError(what)


def _compared(ours: Counter[Any], theirs: Counter[Any]) -> None:
    if ours != theirs:
        only = (sorted(map(repr, (ours - theirs)))[:3], sorted(map(repr, (theirs - ours)))[:3])
        raise _differs(f"only ours: {only[0]}; only theirs: {only[1]}")


def compare_gguf(folder: Path, contents: Any) -> None:
    """Compare names, shapes, types, places and sizes of the tensors of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(folder / "model.gguf")
    except Exception as error:
        raise _differs(f"gguf refuses the file: {type(error).__name__}: {error}") from error
    theirs = Counter(
        (tensor.name, tuple(int(size) for size in tensor.shape[::-1]), tensor.tensor_type.name, tensor.data_offset,
         tensor.n_bytes)
        for tensor in reader.tensors
    )  # fmt: skip
    ours = Counter(
        (tensor.name, tensor.shape, tensor.dtype, tensor.start, tensor.stored_bytes) for tensor in contents.tensors
    )
    _compared(ours, theirs)


def compare_safetensors(folder: Path, contents: Any) -> None:
    """Compare names, shapes and bytes of the tensors of a safetensors file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        theirs = {name: file.get_tensor(name) for name in names}
    _compared(
        Counter((tensor.name, tensor.shape) for tensor in contents.tensors),
        Counter((name, tuple(tensor.shape)) for name, tensor in theirs.items()),
    )
    for tensor in contents.tensors:
        import torch

        flat = theirs[tensor.name].contiguous().reshape(-1)
        expected = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        if tensor.data().tobytes() != expected:
            raise _differs(f"other bytes of {tensor.name!r}")


def _tensors(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield from _of_node(node)
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (
            part for name in ("values", "indices") if sparse.HasField(name) for part in (getattr(sparse, name),)
        )


def _of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from ([attribute.t] if attribute.HasField("t") else [])
        yield from attribute.tensors
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _tensors(graph)


def compare_onnx(folder: Path, contents: Any) -> None:
    """Compare shapes, types and values of the tensors of an ONNX file. Names are those of the nodes that use them."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
    except DecodeError:
        # The package parses messages that ours steps over, such as types and values of inputs.
        return
    tensors = [
        *_tensors(model.graph),
        *(t for function in model.functions for node in function.node for t in _of_node(node)),
    ]
    _compared(Counter(tensor.shape for tensor in contents.tensors), Counter(tuple(tensor.dims) for tensor in tensors))
    plain = [tensor for tensor in tensors if tensor.data_location != onnx.TensorProto.EXTERNAL]
    named = {(tensor.name, tuple(tensor.dims)): tensor for tensor in plain if tensor.name}
    for stored in contents.tensors:
        theirs = named.get((stored.origin, stored.shape))
        if theirs is None or not stored.readable or stored.path.name != "model.onnx" or _is_repeated(plain, theirs):
            continue
        try:
            expected = onnx.numpy_helper.to_array(theirs)
        except Exception:  # noqa: BLE001, a type or a size that numpy does not have
            continue
        actual = stored.values()
        if actual.dtype != expected.dtype or (actual.tolist() != expected.tolist() and not np.isnan(expected).any()):
            raise _differs(f"other values of {stored.origin!r}")


def _is_repeated(tensors: list[Any], tensor: Any) -> bool:
    return sum(other.name == tensor.name for other in tensors) > 1
