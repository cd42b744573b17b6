"""Export of torch models as ONNX graphs through Hugging Face's exporters, and the numerical comparison with torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from compress.formats.onnx.attention.find import count_unfused, find_attention
from compress.formats.onnx.attention.lower import lower_attention
from compress.formats.onnx.attention.tracing import Plug, Probed, plugged, probe, traced
from compress.formats.onnx.fusions import optimize_graph
from compress.formats.onnx.matrix_products import unfold_batch_transposes, write_einsum
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.prove import of_session, of_torch, prove
from compress.formats.silence import silence
from compress.formats.tracing import as_written, lean_tracing
from compress.models.config_checks import max_positions
from compress.tasks.inference import tensors
from compress.tasks.task import Examples
from compress.utils.errors import ModelError, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.models.torch_model import TorchModel


_AXES = ("batch_size", "sequence_length")
_SMALLEST_LENGTH, _LONGEST = 2, 512
_INNER = re.compile(r"\w+_outputs?\.")
_GUARD = "Constraints violated"
ATTENTION = "attention"
"""Among the names of rewrites: attention plugged in, or found in the graph."""
_PRODUCER = "compress"
Axes = Mapping[str, Mapping[int, str]]
"""Input -> axis -> its name."""


@dataclass(frozen=True)
class Exported:
    """A graph, how often each rewrite matched in it, and how much attention is no operator of its own, and why."""

    graph: onnx.ModelProto
    rewrites: dict[str, int] = field(default_factory=dict)
    unfused: str = ""


def export_onnx(
    model: TorchModel, examples: Examples, opset: int | None, fusions: bool, leave_out: Collection[str] = ()
) -> Exported:
    """Trace ``model`` with dynamic batch and length; ``fusions`` targets ONNX Runtime's CPU operators.

    Inputs that may not be padded, such as images, keep the shape that they have; only their batch is free.

    ``leave_out`` names rewrites of `compress.formats.onnx.fusions` to do without, for measuring what each is worth.
    Two examples of different length are traced together, because a batch of one would freeze the batch axis. The
    graph carries no stack traces or paths, so the same weights give the same bytes. Raises `StageError`, and
    `ModelError` for a model that computes with one length alone.
    """
    model.module.eval()
    attention = fusions and ATTENTION not in leave_out
    probed = probe(model.module, examples) if attention else Probed(refused="left out")
    program = _trace(model, examples, opset, plug=attention and probed.refused is None)
    _drop_inner_outputs(program)
    _tell_shapes(program)
    _keep_answers(program, examples)
    axes = {name: dict(enumerate((axis, *_AXES[1:]))) for name, axis in examples.batches.items()}
    return _finished(program, axes, fusions, attention, probed, leave_out)


def export_part(
    part: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Axes,
    multiples: Mapping[str, int],
    opset: int | None,
    fusions: bool,
) -> Exported:
    """Trace a module of any library, whose forward takes ``inputs`` by name and gives outputs by name.

    ``axes`` are the free ones, input -> axis -> its name; in ``inputs`` they have sizes above 1, all of them different.
    Those whose name is among ``multiples`` are multiples of that number alone. Raises `StageError`.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    sizes = {name: times * torch.export.Dim(f"{name}_step", min=1) for name, times in multiples.items() if times > 1}
    free = {
        name: {place: sizes.get(axis, torch.export.Dim.AUTO) for place, axis in axes.get(name, {}).items()}
        for name in inputs
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=free, opset_version=opset)
    try:
        with silence("prints"), lean_tracing():
            program, _ = OnnxExporter().export_program(part.eval(), dict(inputs), config)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _failed(error) from error
    _tell_shapes(program)
    return _finished(program, axes, fusions, attention=fusions, probed=Probed(), leave_out=())


def _finished(
    program: ir.Model, axes: Axes, fusions: bool, attention: bool, probed: Probed, leave_out: Collection[str]
) -> Exported:
    """A traced graph with the runtime's operators, its free axes named."""
    rewrites, unfused = {}, ""
    if fusions:
        found, unfused = _fuse(program, attention, probed)
        rewrites = {ATTENTION: found} if attention else {}
        rewrites |= optimize_graph(program, leave_out)
    _name_axes(program, axes)
    _tell_shapes(program)
    _strip(program)
    return Exported(ir.to_proto(program), rewrites, unfused)


def _trace(model: TorchModel, examples: Examples, opset: int | None, plug: bool) -> ir.Model:
    """Two examples of different length, with free axes.

    Where torch can't prove what a model's branches ask of every length (MobileBERT, XLNet, T5), it is left to
    the proof that the graph is equal.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    sample = _two_lengths(examples)
    inputs = {name: value for name, value in tensors(examples, sample).items() if name in examples.padding}
    failure: Exception | None = None
    for shortest, deferred in ((_SMALLEST_LENGTH, False), (2 * _SMALLEST_LENGTH, True)):
        config = OnnxConfig(
            dynamic=True,
            dynamic_shapes=_free(model, examples, shortest),
            opset_version=opset,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )
        try:
            attention = plugged(model.module, Plug(traced)) if plug else nullcontext()
            tracing = (silence("prints"), lean_tracing(), as_written(model.module), _without_cache(model.module))
            with ExitStack() as stack:
                for context in (*tracing, attention):
                    stack.enter_context(context)
                program: ir.Model = OnnxExporter().export(model.module, inputs, config).program
            return program
        except (RuntimeError, ValueError, TypeError) as error:
            failure = error
            if _GUARD not in str(error):
                break
    raise _refused(model, failure) from failure


def _keep_answers(program: ir.Model, examples: Examples) -> None:
    """Of a model whose answers are several outputs those, and what clients ask for beside them; in place.

    What lies between is nobody's answer.
    """
    outputs, answers = program.graph.outputs, examples.outputs
    wanted = [output for output in outputs if output.name in (*answers, *examples.beside)]
    if len(answers) > 1 and len(wanted) < len(outputs) and {output.name for output in wanted} >= set(answers):
        outputs[:] = wanted
        RemoveUnusedNodesPass()(program)


def _free(model: TorchModel, examples: Examples, shortest: int) -> dict[str, dict[int, torch.export.Dim]]:
    """The axes of each input that are free; the graph takes texts below ``shortest`` all the same."""
    if examples.free is not None:
        shortest, longest = max(shortest, examples.free[0]), examples.free[1]
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
    text = str(error)
    if _GUARD in text:
        guard = next((line for line in text.splitlines() if line.strip().startswith("-")), text)
        return ModelError(
            f"{type(model.module).__name__} computes with the length of its input as with a fixed number.",
            expected="a model whose graph holds for every length",
            hint=f"choose another family; the exporter says: {' '.join(guard.split())[:300]}",
        )
    return _failed(error)


def _failed(error: Exception | None) -> StageError:
    return StageError(f"The model cannot be exported to ONNX: {error}", hint="try another opset, or fusions: false")


@contextmanager
def _without_cache(module: PreTrainedModel) -> Iterator[None]:
    """A decoder used as an encoder gives no keys and values back, and XLNet no memories."""
    before = {name: True for name in ("use_cache", "use_mems_eval") if getattr(module.config, name, False)}
    for name in before:
        setattr(module.config, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module.config, name, value)


def _fuse(program: ir.Model, attention: bool, probed: Probed) -> tuple[int, str]:
    """ONNX Runtime's operators, in place: how many are attention, and what of it is left and why."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    if not attention:
        fuse_for_onnxruntime(program, "cpu")
        unfold_batch_transposes(program)
        return 0, ""
    write_einsum(program)
    find_attention(program)
    fuse_for_onnxruntime(program, "cpu")
    unfold_batch_transposes(program)
    count, left = lower_attention(program), count_unfused(program)
    reasons = "; ".join(probed.unfused) or "of a form that no operator has"
    return count, f"attention unfused in {left} places: {reasons}" if left else ""


def _two_lengths(examples: Examples) -> list[int]:
    lengths = examples.lengths()
    return [int(lengths.argmin()), int(lengths.argmax())] if len(lengths) > 1 else [0, 0]


def _drop_inner_outputs(model: ir.Model) -> None:
    """What the parts of a model give beside the whole, such as `text_model_output.last_hidden_state`, goes; in place.

    No client asks for it, and what nothing else reads would be computed all the same.
    """
    outputs = model.graph.outputs
    kept = [value for value in outputs if not _INNER.match(value.name or "")]
    if len(kept) < len(outputs):
        outputs[:] = kept
        RemoveUnusedNodesPass()(model)


def _name_axes(model: ir.Model, axes: Axes) -> None:
    """Call the free axes by their names, in place; tracing gives them numbered symbols such as ``s43``.

    An input that ``axes`` doesn't have is a batch of texts.
    """
    graph, texts = model.graph, dict(enumerate(_AXES))
    symbols = {
        str(value.shape[place]): name
        for value in graph.inputs
        for place, name in axes.get(str(value.name), texts).items()
        if value.shape is not None and place < len(value.shape) and isinstance(value.shape[place], ir.SymbolicDim)
    }
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            # Several values may share one shape, and some shapes are frozen.
            value.shape = ir.Shape([_renamed(axis, symbols) for axis in value.shape])


def _renamed(axis: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(axis, int):
        return axis
    if axis.value is None or axis.value in symbols:
        return axis.value and symbols[axis.value]
    return re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), axis.value)


def _tell_shapes(model: ir.Model) -> None:
    """Stored tensors are recorded with the shapes that they have, in place.

    transformers records a scale of one element as a scalar, and shape inference refuses such a graph.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape)


def _strip(model: ir.Model) -> None:
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


def prove_equal(graph: onnx.ModelProto, model: TorchModel, examples: Examples, tolerance: float) -> float:
    """The largest difference of a logit, or of an embedding's entry, from torch. Raises `IntegrityError`."""
    what = f"The exported graph's {examples.answers_are} differ from torch"
    reference, found = of_torch(model.module, examples), of_session(session_of(graph), examples)
    return prove(reference, found, examples, tolerance, what, hint=_MEND).worst
