"""A torch model as an ExecuTorch program: traced, quantized if asked, lowered to XNNPACK, and proven."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from compress.formats.executorch.model import PTE_FILE, Axes, ExecuTorchModel, ProgramInterface, with_interface
from compress.formats.executorch.runtime import load_runtime
from compress.formats.parity import check_parity, measure_distance, session_answers, torch_answers
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import open_model
from compress.formats.tracing import lean_tracing, without_padding_masks
from compress.tasks.inference import tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError, first_line

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel


Precision = Literal["fp32", "int8"]
EmbeddingBits = Literal[4, 8]
_GROUP = 32
"""Weights that share a scale in a table of 4 bits."""
ROWS = 8
"""Rows at once that a program has room for; its memory is laid out for as many when it is loaded."""
_CALIBRATION_EXAMPLES = 128
_FAR = 0.25
"""A share of the largest answer: what 8 bits move so far is computed in float where it is no product."""
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d)
_SHORTEST = 2


@dataclass(frozen=True)
class Lowered:
    """A program, and what it was made of: it answers in torch over the same integers."""

    model: ExecuTorchModel
    source: torch.nn.Module


class _Answering(torch.nn.Module):
    """A model with inputs and outputs in a fixed order."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._names, self._outputs = tuple(names), tuple(outputs)

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = self.module(**dict(zip(self._names, values, strict=True)))
        chosen = tuple(found[name] for name in self._outputs)
        return chosen if len(chosen) > 1 else chosen[0]


def to_executorch(
    model: TorchModel, examples: Examples, precision: Precision, embedding_bits: EmbeddingBits, max_length: int
) -> Lowered:
    """``model``, which stays as it is, for up to `ROWS` rows of up to ``max_length`` tokens. Raises `StageError`.

    Images keep the shape that they have. ``examples`` are traced, and where there are convolutions show which ranges
    their inputs have.
    """
    load_runtime()
    sample = _sample(examples)
    interface = ProgramInterface(
        {name: _axes(name, value, examples) for name, value in sample.items()}, examples.outputs
    )
    plain = _with_plain_attention(model.module)
    module: torch.nn.Module = _Answering(plain, tuple(sample), examples.outputs).eval()
    values = tuple(sample.values())
    with suppress_output("process"), lean_tracing(), without_padding_masks(plain), torch.no_grad():
        shapes: Any = _shapes(interface, max(max_length, values[0].shape[-1]))
        try:
            if precision == "int8" and _has_convolutions(module):
                graph = torch.export.export(module, values, dynamic_shapes=shapes).module()
                module = _quantize_static(graph, _calibration(examples, tuple(sample)))
                # A traced model's inputs have names of their own.
                shapes = shapes["values"]
            elif precision == "int8":
                _quantize_dynamic(module, embedding_bits)
            traced = torch.export.export(module, values, dynamic_shapes=shapes)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise StageError(f"The model cannot be traced for ExecuTorch: {first_line(error)}") from error
        program = _lowered(traced)
    return Lowered(ExecuTorchModel({PTE_FILE: program}, with_interface(model.companions(), interface)), module)


def _with_plain_attention(module: Any) -> torch.nn.Module:
    """A copy whose attention is products and a softmax, which XNNPACK runs; torch's own operator brings more along."""
    made: Any = copy.deepcopy(module).eval()
    if hasattr(made, "set_attn_implementation"):
        made.set_attn_implementation("eager")
    return made.requires_grad_(False)  # type: ignore[no-any-return]


def _sample(examples: Examples) -> dict[str, torch.Tensor]:
    """Two examples as far apart in length as can be: a batch of one would freeze that axis."""
    lengths = examples.lengths()
    chosen = [int(lengths.argmin()), int(lengths.argmax())] if len(lengths) > 1 else [0, 0]
    found = tensors(examples, chosen)
    return {name: found[name].contiguous() for name in examples.padding if name in found}


def _axes(name: str, value: torch.Tensor, examples: Examples) -> Axes:
    if examples.padding[name] is None:
        return ("batch_size", *value.shape[1:])
    return ("batch_size", "sequence_length", *value.shape[2:])


def _shapes(interface: ProgramInterface, longest: int) -> dict[str, Any]:
    free = {
        "batch_size": torch.export.Dim("batch_size", min=1, max=ROWS),
        "sequence_length": torch.export.Dim("sequence_length", min=_SHORTEST, max=longest),
    }
    return {
        "values": tuple(
            {place: free[axis] for place, axis in enumerate(axes) if isinstance(axis, str)}
            for axes in interface.inputs.values()
        )
    }


def _calibration(examples: Examples, names: Sequence[str]) -> list[tuple[torch.Tensor, ...]]:
    chosen = np.linspace(0, len(examples) - 1, min(_CALIBRATION_EXAMPLES, len(examples))).round().astype(int).tolist()
    batches = [tensors(examples, chosen[at : at + ROWS]) for at in range(0, len(chosen), ROWS)]
    return [tuple(batch[name] for name in names) for batch in batches]


def _has_convolutions(module: torch.nn.Module) -> bool:
    """Whether 8 bits need ranges of inputs that were seen: XNNPACK has no convolution that finds them by itself."""
    return any(isinstance(layer, _CONVOLUTIONS) for layer in module.modules())


def _quantize_dynamic(module: torch.nn.Module, embedding_bits: EmbeddingBits) -> None:
    """Linear layers and embedding tables, in place.

    Products have 8-bit weights, a scale a channel, and inputs rounded in each call, a scale a token. Tables have a
    scale a row; the one with most rows has ``embedding_bits`` bits, where 4 have a scale for every 32 weights.
    """
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup

    tables = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    for table in tables:
        # It only matters to training, and keeps the operator for quantized tables from being found.
        table.padding_idx = None
        few = table is largest and embedding_bits == 4 and table.embedding_dim % _GROUP == 0
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4" if few else "int8"),
            granularity=PerGroup(_GROUP) if few else PerAxis(0),
        )
        quantize_(module, config, _only(table))
    products = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0), weight_mapping_type=MappingType.SYMMETRIC
    )
    quantize_(module, products)


def _only(table: torch.nn.Module) -> Callable[[torch.nn.Module, str], bool]:
    return lambda layer, name: layer is table


def _quantize_static(
    graph: torch.fx.GraphModule, calibration: Sequence[tuple[torch.Tensor, ...]]
) -> torch.fx.GraphModule:
    """Convolutions and products of a traced model, with ranges of what ``calibration`` leads to (PT2E).

    So are sums of them, unless that takes answers far away: those with outliers have too few steps in 8 bits.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config, products = get_symmetric_quantization_config(is_per_channel=True), XNNPACKQuantizer()
    for kind in (torch.nn.Linear, *_CONVOLUTIONS):
        products.set_module_type(kind, config)
    made = _calibrated(copy.deepcopy(graph), XNNPACKQuantizer().set_global(config), calibration)
    near = _moved(graph, made, calibration[0]) < _FAR
    return made if near else _calibrated(graph, products, calibration)


def _calibrated(
    graph: torch.fx.GraphModule, quantizer: Any, calibration: Iterable[tuple[torch.Tensor, ...]]
) -> torch.fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for inputs in calibration:
            prepared(*inputs)
    made: torch.fx.GraphModule = convert_pt2e(prepared)
    return made


def _moved(plain: Any, made: Any, inputs: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of an output, as a share of the largest magnitude that it has."""
    with torch.no_grad():
        pairs = [(one,) if isinstance(one, torch.Tensor) else one for one in (plain(*inputs), made(*inputs))]
    return max(float((own - other).abs().max() / own.abs().max()) for own, other in zip(*pairs, strict=True))


def _lowered(traced: Any) -> bytes:
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.error import ExportError
    from torch._export.verifier import SpecViolationError

    # Without it, quantized tables would be stored as floats.
    config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    # Products of more than two axes are traced with copies of their inputs for shapes that already agree. XNNPACK can't
    # run those, and would be called once for each piece between them.
    passes = [RemoveNoopExpandCopyPass()]
    try:
        edge = to_edge_transform_and_lower(traced, transform_passes=passes, partitioner=[XnnpackPartitioner()])
        made = edge.to_executorch(config)
    except (RuntimeError, ValueError, TypeError, AssertionError, ExportError, SpecViolationError) as error:
        raise _refused(traced, first_line(error), str(error)) from error
    operators = {
        f"{one.name}.{one.overload}" if one.overload else one.name
        for plan in made.executorch_program.execution_plan
        for one in plan.operators
    }
    absent = sorted(operators - load_runtime().operator_registry.operator_names)
    if absent:
        raise _refused(traced, f"it has no kernel for {', '.join(absent)}", " ".join(absent))
    return bytes(made.buffer)


def _refused(traced: Any, reason: str, text: str) -> StageError:
    """An error that names the modules whose operators are named in ``text``."""
    named = {name.replace("::", ".") for name in re.findall(r"aten(?:\.|::)\w+", text)}
    places = sorted(
        {f"{_operator(node)} in {_module(node)}" for node in traced.graph.nodes if _operator(node) in named}
    )
    shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
    return StageError(
        f"ExecuTorch cannot run the model: {reason}{f' ({shown})' if places else ''}",
        expected="operators that XNNPACK or ExecuTorch's portable kernels have",
        hint="replace that module, or leave this target out",
    )


def _operator(node: Any) -> str:
    """`aten.sort` of a call of it, without what tells its variants apart."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.replace("::", ".")


def _module(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    where = re.sub(r"^(L\['self'\]\.)?module\.?", "", str(path)) or "the model"
    return f"{where} ({getattr(kind, '__name__', str(kind).rpartition('.')[2])})"


def check_program_parity(made: Lowered, model: TorchModel, examples: Examples, tolerance: float) -> str:
    """What to tell of a program, on padded batches and a single example. Raises `IntegrityError`.

    In fp32 it may differ from torch by ``tolerance``. In 8 bits an input that lies between two integers may be rounded
    either way, so that it may be as far again from torch over the same integers as these are from the float model.
    """
    session = open_model(made.model)
    integers = torch_answers(_ByName(made, tuple(session.inputs), tuple(session.output_types)), examples)
    apart = measure_distance(torch_answers(model.module, examples), integers, examples)
    words, allowed = examples.answer_label, apart.worst + tolerance
    what = f"In ExecuTorch the {words} differ from torch"
    near = check_parity(integers, session_answers(session, examples), examples, allowed, what)
    if apart.worst <= tolerance:
        return f"{words} differ by at most {near.worst:.1e} from torch"
    return (
        f"{words} differ by at most {near.worst:.1e} from torch over the same integers, which are {apart.worst:.1e} "
        f"from the float model, where the largest is {apart.largest:.1f}"
    )


class _ByName:
    """What a program was made of, called as the model that it stands for is."""

    def __init__(self, made: Lowered, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self._made, self._inputs, self._outputs = made, inputs, outputs

    def eval(self) -> _ByName:
        return self

    def __call__(self, **values: Any) -> Any:
        given = [values[name] for name in self._inputs]
        found = self._made.source(*given)
        return SimpleNamespace(**dict(zip(self._outputs, found if isinstance(found, tuple) else (found,), strict=True)))
