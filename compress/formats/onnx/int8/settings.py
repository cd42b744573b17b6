"""Settings of INT8 quantization in a recipe, and the nodes that they select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.graph_reader import INTEGER_OPERATORS
from compress.formats.target_profile import find_processor
from compress.stages.base import SEARCH_TIMES, AppliesTo
from compress.tasks.capability import TAKES_ARRAYS
from compress.utils.errors import StageError
from compress.utils.pydantic_models import Frozen

Format = Literal["qoperator", "qdq"]
ReduceRange = bool | Literal["saturating"]
"""7-bit weights everywhere or nowhere, or a coarser grid only for columns of weights that may saturate."""
STATIC_FIELDS = (
    *("calibration_method", "percentile", "types", "smooth_quant", "bias_correction", "weight_rounding"),
    *("cross_layer_equalization", "split_concatenations", "format", "statistics", "calibration_examples"),
)
"""Fields that concern static quantization alone."""
NNCF_FIELDS = ("percentile", "format", "statistics", "calibration_examples")
"""Fields of static quantization that also apply if NNCF finds the ranges."""
SEARCH_FIELDS = ("damage_examples", "search_seconds")
"""Fields that concern the search for layers that stay in float."""

SMALLEST_WEIGHT = 1024
"""Smallest number of elements. Smaller products are as fast in float, and a small output layer is more accurate so."""
OLDEST_OPSET = 13
"""First ONNX operator set in which QuantizeLinear has a scale for each channel."""
WEIGHTED = {"MatMul": 1, "Gemm": 1, "Conv": 1}
"""Operator -> index of the input with the weights."""
WITHOUT_KERNEL = {"ConvTranspose": 1, "GRU": 1, "RNN": 1}
"""Operators that the processor computes only in float; their integer weights would be dequantized in each call."""
BRIDGES = frozenset(
    (
        *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"),
        *("Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Resize", "Pad"),
    )
)
"""Operators that ONNX Runtime's processor runs on 8-bit integers, which pays off if both neighbours are integers."""


class Int8Options(Frozen):
    """Settings that the stage and its algorithms share."""

    method: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="how ranges of activations are found",
        json_schema_extra={SEARCH_TIMES: ["dynamic", "static"]},
    )
    per_channel: bool = Field(True, description="one scale for each output channel rather than each matrix")
    reduce_range: bool | Literal["auto", "saturating"] = Field(
        "auto",
        description="x86 processors without VNNI add pairs of 8-bit products in 16 bits, where they may saturate. "
        "`saturating`: a coarser grid for those columns of weights that may, so that none does; true: 7-bit weights "
        "everywhere; false: neither; auto: `saturating` unless the processors of all targets add in 32 bits",
    )
    calibration_method: Literal["minmax", "percentile", "entropy", "mse"] = Field(
        "minmax",
        description="static: how much of what was seen a range covers; percentile and entropy cut off the few large "
        "channels that transformers rely on",
    )
    calibration_examples: int = Field(
        256, ge=1, description="static: training examples that are looked at, of all labels and lengths alike"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="static: how many values in a hundred `percentile` covers"
    )
    types: Literal["u8s8", "u8u8", "s8s8"] = Field(
        "u8s8",
        description="static: integers of activations and weights; u8s8 is what x86 and ARM kernels are made for, "
        "and on x86 convolutions of s8s8 stay float",
    )
    smooth_quant: float | None = Field(
        None, ge=0, le=1, description="static: SmoothQuant's alpha, 0.5 in the paper; left out: no smoothing"
    )
    bias_correction: bool = Field(True, description="static: take what rounding shifts a mean output by off the bias")
    weight_rounding: Literal["nearest", "feedback"] = Field(
        "nearest",
        description="static: weights of convolutions to the nearest integer, or so that errors cancel on real inputs "
        "(GPTQ's way, on the same grid)",
    )
    cross_layer_equalization: Literal["none", "activations", "weights"] = Field(
        "none",
        description="static: channels between convolutions made alike in size, which float answers don't show: "
        "`weights` by the ranges of the weights on both sides (Nagel et al. 2019), `activations` by what was seen",
    )
    split_concatenations: bool = Field(
        False,
        description="static: a convolution that reads a concatenation becomes one for each part, with ranges of its "
        "own (Q-Diffusion's split of skip connections, Li et al. 2023): for U-Nets, whose two halves differ in range",
    )
    statistics: Literal["own", "nncf"] = Field(
        "own", description="static: who finds ranges, smooths and corrects; NNCF does it in its own way"
    )
    format: Format = Field(
        "qoperator",
        description="static: products and attention as ONNX Runtime's integer operators, or everything as "
        "QuantizeLinear and DequantizeLinear around standard operators",
    )
    keep: tuple[str, ...] = Field(
        (), description="layers to leave in float32, as patterns of the names of nodes or weights: `*conv_stem*`"
    )
    accuracy_floor: Annotated[float | None, AppliesTo(excludes=frozenset({TAKES_ARRAYS}))] = Field(
        None,
        gt=0,
        le=1,
        description="share of the float model's metric on the validation split that must be kept; the layers that do "
        "most damage stay in float, as few as it takes",
    )
    error_ceiling: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="RMS difference of the worst output from the float graph's, over its standard deviation, that is "
        "allowed on training examples; needs no labels. As with accuracy_floor few layers stay in float",
    )
    damage_examples: int = Field(
        64,
        ge=1,
        description="accuracy_floor: examples that each layer's damage is taken on; error_ceiling: examples that the "
        "error is taken on, and of the first of them damage",
    )
    search_seconds: float = Field(
        900, gt=0, description="accuracy_floor and error_ceiling: time after which the best so far is taken"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Int8Options:
        if self.accuracy_floor is not None and self.error_ceiling is not None:
            raise ValueError("accuracy_floor or error_ceiling, not both")
        return self

    @property
    def searches(self) -> bool:
        """Return whether the stage searches for layers that stay float."""
        return self.accuracy_floor is not None or self.error_ceiling is not None

    def narrowing(self) -> ReduceRange:
        """Return `reduce_range`; `auto` is decided by this machine's processor if no recipe did."""
        if self.reduce_range == "auto":
            return False if find_processor("cpu").sums_in_32_bits else "saturating"
        return self.reduce_range


@dataclass(frozen=True)
class QuantizableLayer:
    """A node with weights that can be 8-bit. ``channel_axis`` is the axis of its input's channels."""

    name: str
    operator: str
    weight: str
    elements: int
    channel_axis: int


def refuse_unfit(model: ir.Model) -> None:
    """Raise `StageError` for a graph that is quantized already or has too old an operator set."""
    done = next((node for node in model.graph if node.op_type in INTEGER_OPERATORS), None)
    if done is not None:
        raise StageError(
            f"The graph is quantized already: it has the operator {done.op_type}.",
            where=f"node {done.name!r}",
            expected="a float graph, as `onnx` writes it",
            hint="start from the float model; quantizing twice only loses accuracy",
        )
    # Per-channel scales need a recent operator set.
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise StageError(
            f"The graph has ONNX operator set {opset}, which has no per-channel scales.",
            expected=f"operator set {OLDEST_OPSET} or newer",
            hint="export the model again, or convert it with onnx.version_converter",
        )


def has_layers(model: ir.Model) -> bool:
    """Return whether any node has enough stored float weights; LSTMs, which are quantized separately, do not count."""
    return any(_layer(node) is not None for node in model.graph)


def find_layers(model: ir.Model) -> list[QuantizableLayer]:
    """Return every node with enough stored float weights, in order. Raises `StageError` if there is none."""
    layers = [layer for node in model.graph if (layer := _layer(node)) is not None]
    if not layers:
        raise StageError(
            "The graph has nothing to quantize.",
            expected=f"{', '.join(WEIGHTED)} or Attention with {SMALLEST_WEIGHT} stored fp32 weights or more",
        )
    return layers


def count_without_kernel(model: ir.Model) -> dict[str, int]:
    """Return the number of operators of each type that have stored weights and no integer kernel."""
    return Counter(
        node.op_type
        for node in model.graph
        if node.op_type in WITHOUT_KERNEL and constant(node.inputs[WITHOUT_KERNEL[node.op_type]]) is not None
    )


def _layer(node: ir.Node) -> QuantizableLayer | None:
    """Return a node's layer, or None if it cannot be 8-bit."""
    index = WEIGHTED.get(node.op_type)
    if index is None or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[index]
    array = constant(weight)
    if weight is None or array is None or array.dtype.name != "float32" or array.ndim < 2:
        return None
    convolution = node.op_type.startswith("Conv")
    # Small convolutions are quantized too, because they connect other integer kernels.
    if (array.size < SMALLEST_WEIGHT and not convolution) or (array.ndim > 2 and not convolution):
        return None
    return QuantizableLayer(str(node.name), node.op_type, str(weight.name), int(array.size), 1 if convolution else -1)


def select_bridges(model: ir.Model, layers: Iterable[str]) -> list[str]:
    """Return the nodes that pass 8-bit values from one convolution of ``layers`` to another.

    All computed inputs of such a node come from convolutions or other such nodes, and some of its outputs go to
    ``layers`` or other such nodes. An activation function that is the only reader of a convolution is included in any
    case: it costs nothing within the integer kernel, and its output needs a narrower range.
    """
    nodes = list(model.graph)
    chosen = set(layers)
    sources = {node for node in nodes if str(node.name) in chosen and node.op_type.startswith("Conv")}
    passing: set[ir.Node] = set()
    # Nodes come in topological order, so producers are classified first.
    for node in nodes:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        makers = [value.producer() for value in computed]
        if node.op_type in BRIDGES and makers and all(maker in sources or maker in passing for maker in makers):
            passing.add(node)
    taking = {node for node in nodes if str(node.name) in chosen}
    useful: set[ir.Node] = set()
    # Backwards, so that a node counts as useful if a later useful node reads it.
    for node in reversed(nodes):
        readers = {use.node for output in node.outputs for use in output.uses()}
        if node in passing and (readers & (taking | useful) or _ends(node)):
            useful.add(node)
    return [str(node.name) for node in nodes if node in useful]


def _ends(node: ir.Node) -> bool:
    """Return whether ONNX Runtime fuses a node into the preceding integer convolution."""
    source = node.inputs[0]
    return node.op_type in ("Relu", "Clip") and source is not None and len(list(source.uses())) == 1


def name_nodes(model: ir.Model) -> None:
    """Give each node a unique name, in place."""
    used: set[str] = set()
    for index, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in used else f"{name}_{index}"
        used.add(node.name)
