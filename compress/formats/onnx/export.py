"""Export of torch models as ONNX graphs through Hugging Face's exporters, and the numerical comparison with torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from compress.formats.onnx.attention.find import count_unfused, find_attention
from compress.formats.onnx.attention.lower import lower_attention
from compress.formats.onnx.attention.tracing import (
    AttentionHooks,
    check_attention,
    trace_attention,
    use_attention_functions,
)
from compress.formats.onnx.fusions import optimize_graph, unfold_batch_transposes
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.parity import check_parity, session_answers, torch_answers
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import lean_tracing, with_traceable_builtins
from compress.models.config_checks import max_positions
from compress.tasks.inference import tensors
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.models.model import TorchModel


_AXES = ("batch_size", "sequence_length")
_SMALLEST_LENGTH, _LONGEST = 2, 512
_INNER = re.compile(r"\w+_outputs?\.")
_GUARD = "Constraints violated"
ATTENTION = "attention"
"""Name of the attention rewrite in the report of rewrites."""
_PRODUCER = "compress"
Axes = Mapping[str, Mapping[int, str]]
"""Dynamic axes: input -> axis -> its name."""


@dataclass(frozen=True)
class ExportedGraph:
    """A graph, the number of matches of each rewrite, and why some attention is not one operator."""

    graph: onnx.ModelProto
    rewrites: dict[str, int] = field(default_factory=dict)
    unfused: str = ""


def export_onnx(
    model: TorchModel, examples: Examples, opset: int | None, fusions: bool, leave_out: Collection[str] = ()
) -> ExportedGraph:
    """Trace ``model`` with dynamic batch and length.

    Inputs that may not be padded, such as images, keep their shape; only their batch is dynamic. Two examples of
    different length are traced together, because a batch of one would freeze the batch axis. The graph carries no stack
    traces or paths, so the same weights give the same bytes.

    Args:
        model: The torch model.
        examples: Encoded examples to trace with.
        opset: ONNX operator set, or None for the exporter's default.
        fusions: Whether to fuse operators for ONNX Runtime's CPU kernels.
        leave_out: Names of rewrites of `compress.formats.onnx.fusions` to skip, to measure the effect of each.

    Returns:
        The graph and the rewrites that matched.

    Raises:
        StageError: The exporter fails.
        ModelError: The model works for one input length only.
    """
    model.module.eval()
    attention = fusions and ATTENTION not in leave_out
    # Attention is only replaced if the model gives the same answers with the operator's definition.
    refused = check_attention(model.module, examples) if attention else ""
    program = _trace(model, examples, opset, replaced=attention and not refused)
    # No client reads outputs of a model's parts, such as `text_model_output.last_hidden_state`.
    outputs, answers = program.graph.outputs, examples.outputs
    _keep_outputs(program, [output for output in outputs if not _INNER.match(output.name or "")])
    _record_shapes(program)
    # Several answers are kept with those outputs that clients read beside them.
    named_outputs = [output for output in outputs if output.name in (*answers, *examples.extra_outputs)]
    if len(answers) > 1 and {output.name for output in named_outputs} >= set(answers):
        _keep_outputs(program, named_outputs)
    # The batch axis of an input may have another name than `batch_size`, for several images of a text.
    axes = {name: dict(enumerate((axis, *_AXES[1:]))) for name, axis in examples.batches.items()}
    return _finished(program, axes, fusions, attention, refused, leave_out)


def export_part(
    part: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Axes,
    multiples: Mapping[str, int],
    opset: int | None,
    fusions: bool,
) -> ExportedGraph:
    """Trace a module of any library, whose forward takes ``inputs`` by name and returns outputs by name.

    Args:
        part: The module.
        inputs: Sample inputs. Their dynamic axes have sizes above 1, all of them different.
        axes: Dynamic axes of each input with their names.
        multiples: Axis name -> the number of which its size is always a multiple.
        opset: ONNX operator set, or None for the exporter's default.
        fusions: Whether to fuse operators for ONNX Runtime's CPU kernels.

    Returns:
        The graph and the rewrites that matched.

    Raises:
        StageError: The exporter fails.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    # A dynamic axis that is a multiple of a number is traced as that number times a free dimension.
    sizes = {name: times * torch.export.Dim(f"{name}_step", min=1) for name, times in multiples.items() if times > 1}
    free = {
        name: {axis_index: sizes.get(axis, torch.export.Dim.AUTO) for axis_index, axis in axes.get(name, {}).items()}
        for name in inputs
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=free, opset_version=opset)
    try:
        with suppress_output("prints"), lean_tracing():
            program, _ = OnnxExporter().export_program(part.eval(), dict(inputs), config)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _failed(error) from error
    _record_shapes(program)
    return _finished(program, axes, fusions, attention=fusions, refused="", leave_out=())


def _finished(
    program: ir.Model,
    axes: Axes,
    fusions: bool,
    attention: bool,
    refused: str,
    leave_out: Collection[str],
) -> ExportedGraph:
    """Apply the runtime's fusions to a traced graph and name its dynamic axes."""
    rewrites, unfused = dict[str, int](), ""
    if fusions:
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

        # Attention is searched before the generic fusions, which would hide its softmax.
        if attention:
            find_attention(program)
        fuse_for_onnxruntime(program, "cpu")
        unfold_batch_transposes(program)
        if attention:
            rewrites[ATTENTION] = lower_attention(program)
            if left := count_unfused(program):
                unfused = f"attention unfused in {left} places: {refused or 'no operator has this form'}"
        rewrites |= optimize_graph(program, leave_out)
    # Names are written last, because fusions create values with the symbols of the trace.
    # Tracing gives dynamic axes numbered symbols such as ``s43``; clients expect names.
    graph, texts = program.graph, dict(enumerate(_AXES))
    symbols = {}
    for value in graph.inputs:
        sizes = list(value.shape or ())
        for axis_index, name in axes.get(str(value.name), texts).items():
            if axis_index < len(sizes) and isinstance(sizes[axis_index], ir.SymbolicDim):
                symbols[str(sizes[axis_index])] = name
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            # Several values may share one shape, and some shapes are frozen.
            value.shape = ir.Shape([_renamed(axis, symbols) for axis in value.shape])
    _record_shapes(program)
    _strip(program)
    return ExportedGraph(ir.to_proto(program), rewrites, unfused)


def _trace(model: TorchModel, examples: Examples, opset: int | None, replaced: bool) -> ir.Model:
    """Export two examples of different length with dynamic axes.

    torch cannot prove for some models (MobileBERT, XLNet, T5) that their branches hold for every length. These are
    exported with deferred assertions; the comparison of graph and torch checks them instead.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    # The shortest and the longest example, or one example twice.
    lengths = examples.lengths()
    sample = [int(lengths.argmin()), int(lengths.argmax())] if len(lengths) > 1 else [0, 0]
    inputs = {name: value for name, value in tensors(examples, sample).items() if name in examples.padding}
    failure: Exception | None = None
    # First with guards that torch proves; if it cannot, with longer inputs and deferred runtime assertions.
    for shortest, deferred in ((_SMALLEST_LENGTH, False), (2 * _SMALLEST_LENGTH, True)):
        config = OnnxConfig(
            dynamic=True,
            dynamic_shapes=_free(model, examples, shortest),
            opset_version=opset,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )
        try:
            hooks = AttentionHooks(trace_attention)
            functions = use_attention_functions(model.module, hooks.attend, hooks.mask)
            with (
                suppress_output("prints"),
                lean_tracing(),
                with_traceable_builtins(model.module),
                _without_cache(model.module),
                functions if replaced else nullcontext(),
            ):
                program: ir.Model = OnnxExporter().export(model.module, inputs, config).program
            return program
        except (RuntimeError, ValueError, TypeError) as error:
            failure = error
            # Only violated guards can be deferred; other failures would repeat.
            if _GUARD not in str(error):
                break
    raise _refused(model, failure) from failure


def _free(model: TorchModel, examples: Examples, shortest: int) -> dict[str, dict[int, torch.export.Dim]]:
    """Return the dynamic axes of each input; the graph also accepts texts below ``shortest``."""
    if examples.axis_bounds is not None:
        shortest, longest = max(shortest, examples.axis_bounds[0]), examples.axis_bounds[1]
    else:
        longest = max_positions(model.module.config.to_dict()) or _LONGEST
        longest = longest if longest > shortest else _LONGEST
    batch = torch.export.Dim(_AXES[0], min=1, max=65536)
    length = torch.export.Dim(_AXES[1], min=shortest, max=longest)
    batches = {name: torch.export.Dim(axis, min=1, max=65536) for name, axis in examples.batches.items()}
    return {
        name: {0: batches.get(name, batch)} | ({} if fill is None else {1: length})
        for name, fill in examples.padding.items()
    }


def _refused(model: TorchModel, error: Exception | None) -> StageError | ModelError:
    """Return the error for a failed trace: a frozen length is the model's fault, anything else the exporter's."""
    text = str(error)
    if _GUARD in text:
        guard = next((line for line in text.splitlines() if line.strip().startswith("-")), text)
        return ModelError(
            f"{type(model.module).__name__} only works for one input length.",
            expected="a model that works for every input length",
            hint=f"choose another family; the exporter says: {' '.join(guard.split())[:300]}",
        )
    return _failed(error)


def _failed(error: Exception | None) -> StageError:
    """Return the error for a failure of the exporter."""
    return StageError(f"The model cannot be exported to ONNX: {error}", hint="try another opset, or fusions: false")


@contextmanager
def _without_cache(module: PreTrainedModel) -> Iterator[None]:
    """Turn off cached keys and values of a decoder that is used as an encoder, and XLNet's memories."""
    flags = {name: True for name in ("use_cache", "use_mems_eval") if getattr(module.config, name, False)}
    for name in flags:
        setattr(module.config, name, False)
    try:
        yield
    finally:
        for name, value in flags.items():
            setattr(module.config, name, value)


def _keep_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Drop all outputs but ``outputs``, in place, and the nodes that only they need."""
    if len(outputs) < len(model.graph.outputs):
        model.graph.outputs[:] = outputs
        RemoveUnusedNodesPass()(model)


def _renamed(axis: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    """Return an axis, with every symbol in its expression replaced by its name."""
    if isinstance(axis, int):
        return axis
    if axis.value is None or axis.value in symbols:
        return axis.value and symbols[axis.value]
    return re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), axis.value)


def _record_shapes(model: ir.Model) -> None:
    """Record stored tensors with the shapes that they have, in place.

    transformers records a scale of one element as a scalar, and shape inference refuses such a graph.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape)


def _strip(model: ir.Model) -> None:
    """Remove metadata and doc strings, in place, so that equal weights give equal bytes."""
    model.producer_name, model.producer_version, model.doc_string = _PRODUCER, None, None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()


_MEND = "set fusions: false, try another opset, or raise tolerance if the difference is acceptable"


def verify_parity(graph: onnx.ModelProto, model: TorchModel, examples: Examples, tolerance: float) -> float:
    """Return the largest difference of a logit, or of an embedding's entry, between graph and torch.

    Args:
        graph: The exported graph.
        model: The torch model.
        examples: Examples to compare on.
        tolerance: Largest accepted difference.

    Raises:
        IntegrityError: The difference is larger.
    """
    what = f"The exported graph's {examples.answer_label} differ from torch"
    reference, answers = torch_answers(model.module, examples), session_answers(session_of(graph), examples)
    return check_parity(reference, answers, examples, tolerance, what, hint=_MEND).worst
