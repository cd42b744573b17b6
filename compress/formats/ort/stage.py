"""Write a graph in ONNX Runtime's own format, with identical bytes each time, and with the list of its operators.

ONNX Runtime writes the table of kernel types from a hash map, so its order differs between conversions. A flatbuffer
is built from its end, with the model behind that table. Therefore the model's bytes keep their distance from the
end, and a sorted table is built in front of them, as readers that search it require.
"""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from compress.formats.onnx.model import OnnxModel
from compress.formats.ort.model import IDENTIFIER, OPERATORS_FILE, ORT_FILE, OrtModel, ort_tools
from compress.stages.base import Context, OutputSpec, Stage
from compress.tasks.capability import SINGLE_CALL
from compress.utils.errors import StageError

_LEFT_OUT = ["NchwcTransformer"]
"""Optimization that lays channels out for x86; a file with its operators opens nowhere else."""
_ALIGNMENT = 16


class Ort(Stage[OnnxModel, OrtModel]):
    """ONNX Runtime's own format (`.ort`) for phones and small boards, the only format that a minimal build opens.

    The graph is optimized once, when it is written, for any processor. The list of operators and types for the build
    option `--include_ops_by_config` is written beside it. The stage has no fields.
    """

    packages = ("onnx", "onnxruntime")
    requires = frozenset({SINGLE_CALL})
    guarantees = OutputSpec(changes_weights=False)
    kind: Literal["ort"] = "ort"

    def run(self, model: OnnxModel, context: Context) -> OrtModel:
        """Convert the graph; raise `StageError` if ONNX Runtime refuses it."""
        ort_model = to_ort(model)
        operator_lines = ort_model.companions[OPERATORS_FILE].decode().splitlines()
        context.note(f"ort: {sum(line.count(',') + 1 for line in operator_lines)} operators")
        return ort_model


def to_ort(model: OnnxModel) -> OrtModel:
    """Optimize the only graph of a model for any processor and store it; equal inputs give identical bytes.

    All optimizations run now ("fixed" in ONNX Runtime's terms), because a minimal build runs none. The blocked channel
    layout is left out, because ARM has no kernels for it. Raises `StageError` if ONNX Runtime refuses the graph.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        source, ort_file = Path(folder) / "model.onnx", Path(folder) / ORT_FILE
        onnx.save_model(model.graph, source)
        convert(source, ort_file)
        files = {ORT_FILE: with_sorted_kernel_types(ort_file.read_bytes())}
        return OrtModel(files, {OPERATORS_FILE: operators_of(ort_file).encode(), **model.companions})


def convert(source: Path, target: Path) -> None:
    """Write the graph of ``source`` as the `.ort` file ``target``; raise `StageError` on failure."""
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
    config = file.with_suffix(".config")
    with warnings.catch_warnings():
        # The tool leaves its open file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        ort_tools().create_config_from_models([file], config, enable_type_reduction=True)
    lines = config.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if not line.startswith("#"))


def with_sorted_kernel_types(content: bytes) -> bytes:
    """Return the content of a file as the same session with sorted kernel types."""
    ort_tools()
    from flatbuffers import Builder
    from ort_flatbuffers_py.fbs import InferenceSession

    root = InferenceSession.InferenceSession.GetRootAs(content, 0)
    model = root.Model()._tab.Pos
    (vtable_offset,) = struct.unpack_from("<i", content, model)
    # Keep everything from the model's table, or from its vtable if that comes first, to the end.
    tail = content[min(model, model - vtable_offset) :]
    builder = Builder(len(tail))
    # Continue building in front of the model's bytes.
    builder.Bytes[:], builder.head, builder.minalign = tail, 0, _ALIGNMENT
    types = _kernel_types(builder, root.KernelTypeStrResolver())
    version = builder.CreateString(root.OrtVersion())
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, version)
    InferenceSession.AddModel(builder, len(content) - model)
    InferenceSession.AddKernelTypeStrResolver(builder, types)
    builder.Finish(InferenceSession.End(builder), IDENTIFIER)
    return bytes(builder.Output())


def _kernel_types(builder: Any, resolver: Any) -> int:
    """Write the table of kernel types, sorted by operator and argument, and return its offset."""
    from ort_flatbuffers_py.fbs import KernelTypeStrResolver, OpIdKernelTypeStrArgsEntry

    operators = [resolver.OpKernelTypeStrArgs(index) for index in range(resolver.OpKernelTypeStrArgsLength())]
    entries = []
    # Readers search the entries by binary search, so they are sorted.
    for operator in sorted(operators, key=lambda entry: entry.OpId()):
        types = [operator.KernelTypeStrArgs(index) for index in range(operator.KernelTypeStrArgsLength())]
        arguments = [_arguments(builder, entry) for entry in sorted(types, key=lambda entry: entry.KernelTypeStr())]
        vector = _vector(builder, arguments, OpIdKernelTypeStrArgsEntry.StartKernelTypeStrArgsVector)
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

    arguments = []
    for argument in (types.Args(index) for index in range(types.ArgsLength())):
        ArgTypeAndIndex.Start(builder)
        ArgTypeAndIndex.AddArgType(builder, argument.ArgType())
        ArgTypeAndIndex.AddIndex(builder, argument.Index())
        arguments.append(ArgTypeAndIndex.End(builder))
    vector = _vector(builder, arguments, KernelTypeStrArgsEntry.StartArgsVector)
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
