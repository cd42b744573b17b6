"""The parameters of NNCF's weight compression, named as `nncf.compress_weights` names them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from compress.frozen import Frozen
from compress.quantization.config import GroupSize, Quantization


class NncfOptions(Frozen):
    """What NNCF's torch backend can do to the weights of a decoder, and that a checkpoint can hold."""

    mode: Literal["int4_sym", "int4_asym"] = Field("int4_sym", description="4 bits, without or with zero points")
    group_size: GroupSize = Field(64, description="weights of a row that share a scale; -1: the whole row")
    awq: bool = Field(True, description="scale the inputs with large activations before rounding, where NNCF can")
    scale_estimation: bool = Field(
        True, description="refit the scales so that outputs on calibration text change least"
    )
    ratio: float = Field(
        1.0, gt=0, le=1, description="share of the layers at 4 bits; the most sensitive others get `backup_mode`"
    )
    backup_mode: Literal["none", "int8_sym", "int8_asym"] = Field(
        "int8_sym", description="of embedding, head and the layers beyond `ratio`; `none` leaves them as float16"
    )
    all_layers: bool = Field(False, description="the embedding and the head at 4 bits too")
    samples: int = Field(16, ge=1, le=100_000, description="windows of calibration text from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a window")
    keep: tuple[str, ...] = Field((), description="layers to leave in float16, as patterns of names: `*.mlp.gate`")
    gptq: bool = Field(False, description="must be false: NNCF has it for OpenVINO only")
    lora_correction: bool = Field(False, description="must be false: NNCF has it for OpenVINO only")

    @field_validator("gptq", "lora_correction")
    @classmethod
    def _of_other_backends(cls, value: bool, info: ValidationInfo) -> bool:
        if value:
            instead = {"gptq": "the stage `gptq` has it", "lora_correction": "the stage `lora` trains an adapter"}
            raise ValueError(f"false: NNCF has it for OpenVINO only; {instead[info.field_name or '']}")
        return value

    @property
    def uses_backup(self) -> bool:
        """Whether anything is left to `backup_mode`."""
        return self.ratio < 1 or not self.all_layers

    @property
    def equivalent(self) -> Quantization:
        """The same grid in the words of our own quantizer, which plans layers and predicts sizes by it."""
        table_bits: Literal[4, 8, 16] = 4 if self.all_layers else 16 if self.backup_mode == "none" else 8
        return Quantization(
            method="rtn",
            bits=4,
            group_size=self.group_size,
            sym=self.mode == "int4_sym",
            act_order=False,
            samples=self.samples,
            sequence_length=self.sequence_length,
            embedding_bits=table_bits,
            embedding_group_size=256,
            keep=self.keep,
        )
