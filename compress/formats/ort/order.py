"""A file in ONNX Runtime's own format with its last part in order, so that one graph always gives the same bytes.

ONNX Runtime writes the table of kernels' types from a hash map, whose order differs from one conversion to the next.
flatbuffers are built from the end, the model before that table; so the model stays where it is, seen from the end, and
the table is built anew before it, sorted as readers that search it want it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from compress.formats.ort.read import ort_tools

_ALIGNMENT = 16
_IDENTIFIER = b"ORTM"


def in_order(content: bytes) -> bytes:
    """The same session, ``content`` of a whole file, with sorted types of kernels."""
    ort_tools()
    from flatbuffers import Builder
    from ort_flatbuffers_py.fbs import InferenceSession

    root = InferenceSession.InferenceSession.GetRootAs(content, 0)
    model = root.Model()._tab.Pos
    (to_fields,) = struct.unpack_from("<i", content, model)
    tail = content[min(model, model - to_fields) :]
    builder = Builder(len(tail))
    builder.Bytes[:], builder.head, builder.minalign = tail, 0, _ALIGNMENT
    types = _types(builder, root.KernelTypeStrResolver())
    version = builder.CreateString(root.OrtVersion())
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, version)
    InferenceSession.AddModel(builder, len(content) - model)
    InferenceSession.AddKernelTypeStrResolver(builder, types)
    builder.Finish(InferenceSession.End(builder), _IDENTIFIER)
    return bytes(builder.Output())


def _types(builder: Any, resolver: Any) -> int:
    from ort_flatbuffers_py.fbs import KernelTypeStrResolver, OpIdKernelTypeStrArgsEntry

    found = [resolver.OpKernelTypeStrArgs(index) for index in range(resolver.OpKernelTypeStrArgsLength())]
    entries = []
    for operator in sorted(found, key=lambda one: one.OpId()):
        types = [operator.KernelTypeStrArgs(index) for index in range(operator.KernelTypeStrArgsLength())]
        listed = [_arguments(builder, one) for one in sorted(types, key=lambda one: one.KernelTypeStr())]
        vector = _vector(builder, listed, OpIdKernelTypeStrArgsEntry.StartKernelTypeStrArgsVector)
        name = builder.CreateString(operator.OpId())
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, vector)
        entries.append(OpIdKernelTypeStrArgsEntry.End(builder))
    vector = _vector(builder, entries, KernelTypeStrResolver.StartOpKernelTypeStrArgsVector)
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    return int(KernelTypeStrResolver.End(builder))


def _arguments(builder: Any, types: Any) -> int:
    from ort_flatbuffers_py.fbs import ArgTypeAndIndex, KernelTypeStrArgsEntry

    listed = []
    for argument in (types.Args(index) for index in range(types.ArgsLength())):
        ArgTypeAndIndex.Start(builder)
        ArgTypeAndIndex.AddArgType(builder, argument.ArgType())
        ArgTypeAndIndex.AddIndex(builder, argument.Index())
        listed.append(ArgTypeAndIndex.End(builder))
    vector = _vector(builder, listed, KernelTypeStrArgsEntry.StartArgsVector)
    name = builder.CreateString(types.KernelTypeStr())
    KernelTypeStrArgsEntry.Start(builder)
    KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
    KernelTypeStrArgsEntry.AddArgs(builder, vector)
    return int(KernelTypeStrArgsEntry.End(builder))


def _vector(builder: Any, offsets: Sequence[int], start: Callable[[Any, int], Any]) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
