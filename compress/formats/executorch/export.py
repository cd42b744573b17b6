"""Export of a torch model as an ExecuTorch program: traced, optionally quantized, lowered to XNNPACK and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    from compress.models.model import TorchModel


Precision = Literal["fp32", "int8"]
EmbeddingBits = Literal[4, 8]
_GROUP = 32
"""Weights that share a scale in a 4-bit embedding table."""
ROWS = 8
"""Largest number of rows per call; the program reserves memory for as many when it is loaded."""
_CALIBRATION_EXAMPLES = 128
_FAR = 0.25
"""Largest accepted effect of quantizing sums, as a share of the largest answer.

Above it only products are quantized.
"""
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d)
_SHORTEST = 2


class Lowered(NamedTuple):
    """Program together with the quantized torch module that it was lowered from."""

    model: ExecuTorchModel
    source: torch.nn.Module


class _FixedOrderModule(torch.nn.Module):
    """Module with inputs and outputs in a fixed order."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._names, self._outputs = tuple(names), tuple(outputs)

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.module(**dict(zip(self._names, values, strict=True)))
        selected = tuple(outputs[name] for name in self._outputs)
        return selected if len(selected) > 1 else selected[0]


def to_executorch(
    model: TorchModel, examples: Examples, precision: Precision, embedding_bits: EmbeddingBits, max_length: int
) -> Lowered:
    """Export a model for up to `ROWS` rows of up to ``max_length`` tokens. The model itself stays unchanged.

    Images keep their shape.

    Args:
        model: Torch model.
        examples: Examples for tracing; models with convolutions are also calibrated on them.
        precision: Type of products and convolutions.
        embedding_bits: Bits of the largest embedding table in int8.
        max_length: Largest number of tokens.

    Raises:
        StageError: The model cannot be traced or lowered.
    """
    load_runtime()
    # Trace the shortest and the longest example as one batch. A batch of one would freeze the batch axis.
    lengths = examples.lengths()
    chosen = [int(lengths.argmin()), int(lengths.argmax())] if len(lengths) > 1 else [0, 0]
    batch = tensors(examples, chosen)
    sample = {name: batch[name].contiguous() for name in examples.padding if name in batch}
    axes = {name: _axes(value, examples.padding[name] is not None) for name, value in sample.items()}
    interface = ProgramInterface(axes, examples.outputs)
    # A copy with eager attention, whose products and softmax XNNPACK runs.
    plain: Any = copy.deepcopy(model.module).eval().requires_grad_(False)
    if hasattr(plain, "set_attn_implementation"):
        plain.set_attn_implementation("eager")
    module: torch.nn.Module = _FixedOrderModule(plain, tuple(sample), examples.outputs).eval()
    values = tuple(sample.values())
    with suppress_output("process"), lean_tracing(), without_padding_masks(plain), torch.no_grad():
        longest = max(max_length, values[0].shape[-1])
        free = {
            "batch_size": torch.export.Dim("batch_size", min=1, max=ROWS),
            "sequence_length": torch.export.Dim("sequence_length", min=_SHORTEST, max=longest),
        }
        shapes: Any = tuple(
            {dimension: free[axis] for dimension, axis in enumerate(input_axes) if isinstance(axis, str)}
            for input_axes in axes.values()
        )
        named_shapes: Any = {"values": shapes}
        try:
            # XNNPACK's convolutions cannot find the range of their input at run time, so they are calibrated.
            if precision == "int8" and any(isinstance(layer, _CONVOLUTIONS) for layer in module.modules()):
                graph = torch.export.export(module, values, dynamic_shapes=named_shapes).module()
                module = _quantize_static(graph, _calibration_batches(examples, tuple(sample)))
                # The exported module takes its inputs under new names.
                named_shapes = shapes
            elif precision == "int8":
                _quantize_dynamic(module, embedding_bits)
            traced = torch.export.export(module, values, dynamic_shapes=named_shapes)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise StageError(f"The model cannot be traced for ExecuTorch: {first_line(error)}") from error
        program = _lower_to_xnnpack(traced)
    return Lowered(ExecuTorchModel({PTE_FILE: program}, with_interface(model.companions(), interface)), module)


def _axes(value: torch.Tensor, variable: bool) -> Axes:
    return ("batch_size", "sequence_length", *value.shape[2:]) if variable else ("batch_size", *value.shape[1:])


def _calibration_batches(examples: Examples, names: Sequence[str]) -> list[tuple[torch.Tensor, ...]]:
    """Return up to `_CALIBRATION_EXAMPLES` evenly spaced examples in batches of `ROWS`."""
    chosen = np.linspace(0, len(examples) - 1, min(_CALIBRATION_EXAMPLES, len(examples))).round().astype(int).tolist()
    batches = [tensors(examples, chosen[at : at + ROWS]) for at in range(0, len(chosen), ROWS)]
    return [tuple(batch[name] for name in names) for batch in batches]


def _quantize_dynamic(module: torch.nn.Module, embedding_bits: EmbeddingBits) -> None:
    """Quantize linear layers and embedding tables in place.

    Linear layers have 8-bit weights with a scale per channel and round their inputs in each call, with a scale per
    token. Embedding tables have a scale per row. The largest one has ``embedding_bits`` bits; 4 bits have a scale for
    every 32 weights.
    """
    from torchao import quantization
    from torchao.quantization.granularity import PerAxis, PerGroup

    tables = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    for table in tables:
        # The padding index only matters in training, and it hides the table from the pattern of quantized embeddings.
        table.padding_idx = None
        four_bits = table is largest and embedding_bits == 4 and table.embedding_dim % _GROUP == 0
        dtype = getattr(torch, "int4" if four_bits else "int8")
        granularity = PerGroup(_GROUP) if four_bits else PerAxis(0)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
        quantization.quantize_(module, config, lambda layer, _, table=table: layer is table)
    products = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0), weight_mapping_type=quantization.MappingType.SYMMETRIC
    )
    quantization.quantize_(module, products)


def _quantize_static(
    graph: torch.fx.GraphModule, calibration: Sequence[tuple[torch.Tensor, ...]]
) -> torch.fx.GraphModule:
    """Quantize convolutions and products with calibrated ranges (PT2E).

    Other operators, such as additions, are quantized as well unless that changes answers by more than `_FAR`:
    activations with outliers have too few steps in 8 bits.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer

    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    everything, products = (xnnpack_quantizer.XNNPACKQuantizer() for _ in range(2))
    for kind in (torch.nn.Linear, *_CONVOLUTIONS):
        products.set_module_type(kind, config)
    quantized = _calibrated(copy.deepcopy(graph), everything.set_global(config), calibration)
    # Compare outputs by their largest difference as a share of the largest magnitude.
    with torch.no_grad():
        pairs = list(zip(*(_as_tuple(model(*calibration[0])) for model in (graph, quantized)), strict=True))
    far = max(float((expected - actual).abs().max() / expected.abs().max()) for expected, actual in pairs)
    return quantized if far < _FAR else _calibrated(graph, products, calibration)


def _as_tuple(answers: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (answers,) if isinstance(answers, torch.Tensor) else answers


def _calibrated(
    graph: torch.fx.GraphModule, quantizer: object, calibration: Iterable[tuple[torch.Tensor, ...]]
) -> torch.fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for inputs in calibration:
            prepared(*inputs)
    converted: torch.fx.GraphModule = convert_pt2e(prepared)
    return converted


def _lower_to_xnnpack(traced: object) -> bytes:
    """Lower a traced model to XNNPACK and return the program; raise `StageError` if an operator is not supported."""
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.error import ExportError
    from torch._export.verifier import SpecViolationError

    # Without this pass, quantized tables would be stored as floats.
    config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    # Products of more than two axes are traced with copies of their inputs for shapes that already agree. XNNPACK can't
    # run those, and would be called once for each piece between them.
    passes = [RemoveNoopExpandCopyPass()]
    try:
        edge = to_edge_transform_and_lower(traced, transform_passes=passes, partitioner=[XnnpackPartitioner()])
        program = edge.to_executorch(config)
    except (RuntimeError, ValueError, TypeError, AssertionError, ExportError, SpecViolationError) as error:
        raise _lowering_error(first_line(error)) from error
    # The runtime must have a kernel for every operator that XNNPACK does not run.
    operators = {
        f"{operator.name}.{operator.overload}".rstrip(".")
        for plan in program.executorch_program.execution_plan
        for operator in plan.operators
    }
    missing = sorted(operators - load_runtime().operator_registry.operator_names)
    if missing:
        raise _lowering_error(f"it has no kernel for {', '.join(missing)}")
    return bytes(program.buffer)


def _lowering_error(reason: str) -> StageError:
    return StageError(
        f"ExecuTorch cannot run the model: {reason}",
        expected="operators that XNNPACK or ExecuTorch's portable kernels have",
        hint="replace the module that calls them, or leave this target out",
    )


def check_program_parity(made: Lowered, model: TorchModel, examples: Examples, tolerance: float) -> str:
    """Compare the program with torch on padded batches and a single example, and return a summary.

    In fp32 answers may differ by ``tolerance``. In 8 bits, an input halfway between two integers may be rounded either
    way. Therefore the program may differ from the quantized torch module by as much as that module differs from the
    float model.

    Args:
        made: Program and the module that it was lowered from.
        model: Float model.
        examples: Examples to compare on.
        tolerance: Largest accepted difference in fp32.

    Raises:
        IntegrityError: The answers differ too much.
    """
    session = open_model(made.model)
    names = tuple(session.inputs), tuple(session.output_types)
    quantized_answers = torch_answers(_NamedInputModule(made.source, *names), examples)
    quantization_distance = measure_distance(torch_answers(model.module, examples), quantized_answers, examples)
    label, allowed = examples.answer_label, quantization_distance.worst + tolerance
    what = f"In ExecuTorch the {label} differ from torch"
    program_distance = check_parity(quantized_answers, session_answers(session, examples), examples, allowed, what)
    summary = f"{label} differ by at most {program_distance.worst:.1e} from torch"
    if quantization_distance.worst <= tolerance:
        return summary
    from_floats = f"{quantization_distance.worst:.1e} from the float model"
    largest = f"where the largest is {quantization_distance.largest:.1f}"
    return f"{summary} over the same integers, which are {from_floats}, {largest}"


class _NamedInputModule:
    """Adapter that calls a lowered program's source module with named inputs, as the original model is called."""

    def __init__(self, source: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self._source, self._inputs, self._outputs = source, inputs, outputs

    def eval(self) -> _NamedInputModule:
        return self

    def __call__(self, **values: object) -> Any:
        outputs = _as_tuple(self._source(*(values[name] for name in self._inputs)))
        return SimpleNamespace(**dict(zip(self._outputs, outputs, strict=True)))
