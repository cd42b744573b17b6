"""Settings of INT8 quantization in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.formats.target_profile import find_processor
from compress.stages.base import SEARCH_TIMES, AppliesTo
from compress.tasks.capability import TAKES_ARRAYS
from compress.utils.pydantic_models import Frozen

Format = Literal["qoperator", "qdq"]
ReduceRange = bool | Literal["saturating"]
"""7-bit weights everywhere or nowhere, or a coarser grid only for columns of weights that may saturate."""
STATIC_FIELDS = (
    *("calibration_method", "bias_correction", "weight_rounding", "split_concatenations", "format"),
    *("statistics", "calibration_examples"),
)
"""Fields that concern static quantization alone."""
NNCF_FIELDS = ("format", "statistics", "calibration_examples")
"""Fields of static quantization that also apply if NNCF finds the ranges."""


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
    calibration_method: Literal["minmax", "percentile", "mse"] = Field(
        "minmax",
        description="static: how much of what was seen a range covers; percentile (99.99) cuts off the few large "
        "channels that transformers rely on",
    )
    calibration_examples: int = Field(
        256, ge=1, description="static: training examples that are looked at, of all labels and lengths alike"
    )
    bias_correction: bool = Field(True, description="static: take what rounding shifts a mean output by off the bias")
    weight_rounding: Literal["nearest", "feedback"] = Field(
        "nearest",
        description="static: weights of convolutions to the nearest integer, or so that errors cancel on real inputs "
        "(GPTQ's way, on the same grid)",
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
