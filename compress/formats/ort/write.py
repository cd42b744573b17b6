"""ONNX Runtime's own conversion of a graph into its format, with the same bytes each time, and its list of operators.

It writes the table of kernels' types from a hash map, whose order differs from one conversion to the next. flatbuffers
are built from the end, the model before that table; so the model stays where it is, seen from the end, and the table is
built anew before it, sorted as readers that search it want it.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.formats.onnx.model import OnnxModel
from compress.formats.ort.model import IDENTIFIER, OPERATORS_FILE, ORT_FILE, OrtModel, ort_tools
from compress.utils.errors import StageError

_LEFT_OUT = ["NchwcTransformer"]
"""It lays channels out for x86; a file with such operators opens nowhere else."""
_ALIGNMENT = 16


def to_ort(model: OnnxModel) -> OrtModel:
    """``model``'s only graph optimized for any processor and stored, the same bytes each time.

    All optimizations are done now ("fixed" in ONNX Runtime's words) but the one for blocked channels, which ARM doesn't
    have: a minimal build does none of its own. Raises `StageError` for a graph that ONNX Runtime refuses.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "model.onnx", Path(folder) / ORT_FILE
        onnx.save_model(model.graph, source)
        convert(source, made)
        own = {ORT_FILE: in_order(made.read_bytes())}
        return OrtModel(own, {OPERATORS_FILE: operators_of(made).encode(), **model.companions})


def convert(source: Path, target: Path) -> None:
    """Write the graph of ``source`` as the `.ort` file ``target``. Raises `StageError`."""
    import onnxruntime

    from compress.formats.onnx.runtimes.onnxruntime import FAILURES, session_options

    options = session_options(1)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=_LEFT_OUT)
    except FAILURES as error:
        raise StageError(f"ONNX Runtime cannot write the graph in its own format: {error}") from error


def operators_of(file: Path) -> str:
    """Return the `domain;opset;operators` lines with types that ONNX Runtime's build script reads."""
    listed = file.with_suffix(".config")
    with warnings.catch_warnings():
        # It leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        ort_tools().create_config_from_models([file], listed, enable_type_reduction=True)
    lines = listed.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if not line.startswith("#"))


def in_order(content: bytes) -> bytes:
    """Return ``content``, a whole file, as the same session with sorted kernel types."""
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
    builder.Finish(InferenceSession.End(builder), IDENTIFIER)
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
