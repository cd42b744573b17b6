"""Settings of INT8 quantization in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

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
        description="method that determines activation ranges",
        json_schema_extra={SEARCH_TIMES: ["dynamic", "static"]},
    )
    per_channel: bool = Field(True, description="one scale per output channel instead of one per matrix")
    reduce_range: bool | Literal["auto", "saturating"] = Field(
        "auto",
        description="x86 processors without VNNI add pairs of 8-bit products in 16 bits, where they may saturate. "
        "`saturating`: a coarser grid for the weight columns that could saturate; true: 7-bit weights "
        "everywhere; false: no protection; auto: `saturating` unless the processors of all targets add in 32 bits",
    )
    calibration_method: Literal["minmax", "percentile", "mse"] = Field(
        "minmax",
        description="static: a range covers all observed activations (minmax) or 99.99% of them (percentile), which "
        "clips the few outlier channels that transformers rely on; mse: the range with the least squared error",
    )
    calibration_examples: int = Field(
        256, ge=1, description="static: calibration examples from the train split, balanced over labels and lengths"
    )
    bias_correction: bool = Field(
        True, description="static: subtract the mean output shift caused by rounding from the bias"
    )
    weight_rounding: Literal["nearest", "feedback"] = Field(
        "nearest",
        description="static: round weights of convolutions to the nearest integer, or such that errors cancel on "
        "calibration inputs (as GPTQ does, on the same grid)",
    )
    split_concatenations: bool = Field(
        False,
        description="static: split a convolution after a concatenation into one per part, each with its own range "
        "(Q-Diffusion, Li et al. 2023); for U-Nets with skip connections",
    )
    statistics: Literal["own", "nncf"] = Field(
        "own", description="static: implementation of ranges, smoothing and bias correction: ours or NNCF's"
    )
    format: Format = Field(
        "qoperator",
        description="static: ONNX Runtime's integer operators for matrix products and attention, or QuantizeLinear "
        "and DequantizeLinear around standard operators",
    )
    keep: tuple[str, ...] = Field(
        (), description="layers to keep in float32, as patterns of node or weight names, e.g. `*conv_stem*`"
    )
    accuracy_floor: Annotated[float | None, AppliesTo(excludes=frozenset({TAKES_ARRAYS}))] = Field(
        None,
        gt=0,
        le=1,
        description="minimum share of the float model's metric on the validation split; as few layers as possible, "
        "those with the largest loss, stay in float",
    )
    error_ceiling: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="maximum RMS error of the worst output relative to its standard deviation, on training examples "
        "without labels; as with accuracy_floor, as few layers as possible stay in float",
    )
    damage_examples: int = Field(
        64,
        ge=1,
        description="accuracy_floor: examples that measure each layer's loss; error_ceiling: examples that measure "
        "the error",
    )

    @field_validator("error_ceiling")
    @classmethod
    def _one_bound(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("accuracy_floor") is not None:
            raise ValueError("accuracy_floor or error_ceiling, not both")
        return value

    @property
    def searches(self) -> bool:
        """Return whether the stage searches for layers that stay float."""
        return self.accuracy_floor is not None or self.error_ceiling is not None

    def narrowing(self) -> ReduceRange:
        """Return `reduce_range`; `auto` is decided by this machine's processor if no recipe did."""
        if self.reduce_range == "auto":
            return False if find_processor("cpu").sums_in_32_bits else "saturating"
        return self.reduce_range
