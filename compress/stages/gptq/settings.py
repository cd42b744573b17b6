"""The parameters of weight-only quantization, by our own solver and by NNCF, which the stages inherit."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH
from compress.utils.pydantic_models import Frozen

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[-1, 16, 32, 64, 128, 256, 512, 1024]
FLOAT_BITS = 16
"""Bits of a parameter that is not quantized: float16 or bfloat16."""


class Quantization(Frozen):
    """Settings of weight-only quantization, named after transformers' `GPTQConfig` where it has them."""

    method: Literal["gptq", "rtn"] = Field(
        "gptq", description="`gptq`, or `rtn`: round to nearest, without calibration"
    )
    bits: Bits = Field(4, description="bits of the weights of linear layers", json_schema_extra={SEARCH: [3, 4, 8]})
    group_size: GroupSize = Field(
        64,
        description="weights of a row that share a scale; -1: the whole row",
        json_schema_extra={SEARCH: [32, 64, 128]},
    )
    sym: bool = Field(True, description="symmetric quantization without zero points")
    act_order: bool = Field(
        True, description="quantize columns with the largest activations first; groups in the file stay contiguous"
    )
    guided: bool = Field(
        True,
        description="weight tokens by the gradient of the loss (GuidedQuant); needs a forward and a backward pass of "
        "the float model",
    )
    damp_percent: float = Field(0.05, gt=0, lt=1, description="damping of the Hessian's diagonal, relative to its mean")
    samples: int = Field(16, ge=1, le=100_000, description="sequences of calibration text from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")
    expert_tokens: int = Field(
        128,
        ge=1,
        le=1_000_000,
        description="mixtures of experts: minimum calibration tokens of an expert; if the router sends fewer, all "
        "tokens of the layer supplement them and the expert is reported",
    )
    embedding_bits: Literal[4, 5, 8, 16] | None = Field(
        None,
        description="bits of the embedding table and the output head; 16: float16. Default: 8; 5 if 8-bit tables "
        "would be larger than all other weights, or with `sym: false`, unless `bits` is 8; or as `target_bits` or "
        "`max_bytes` chooses",
        json_schema_extra={SEARCH: [4, 8]},
    )
    embedding_group_size: Literal[16, 32, 64, 128, 256] = Field(
        32, description="weights of a row of the embedding that share a scale"
    )
    target_bits: float | None = Field(
        None,
        gt=2,
        lt=16,
        description="mixed bits: maximum average bits per parameter, with scales and embedding",
        json_schema_extra={SEARCH: [3.5, 4.0, 4.25, 4.6, 5.0]},
    )
    max_bytes: int | None = Field(None, gt=0, description="mixed bits: maximum bytes of all tensors")
    choices: tuple[Bits, ...] = Field(
        (2, 3, 4, 8),
        min_length=1,
        description="mixed bits: permitted bits of a layer; ONNX Runtime and GGUF store 3 as 4",
    )
    keep: tuple[str, ...] = Field((), description="layers to keep in float16, as patterns of names, e.g. `*.mlp.gate`")
    precision: Literal["auto", "fastest", "fp32", "bf16"] = Field(
        "auto",
        description="data type of the calibration's forward passes; `auto`: bf16 if the processor supports it; "
        "`fastest`: bf16 if it is measured to be faster than fp32",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.target_bits is not None and self.max_bytes is not None:
            raise ValueError("give target_bits or max_bytes, not both")
        if self.method == "rtn" and (self.target_bits is not None or self.max_bytes is not None):
            raise ValueError("target_bits and max_bytes need method: gptq, since sensitivity is measured on data")
        return self

    @property
    def mixed(self) -> bool:
        """Return whether bits are chosen layer by layer under a budget."""
        return self.target_bits is not None or self.max_bytes is not None

    @property
    def integer_tables(self) -> bool:
        """Return whether the embedding and the head are quantized, unless `keep` names them."""
        return self.embedding_bits != FLOAT_BITS

    @property
    def chooses_tables(self) -> bool:
        """Return whether the bits of the embedding and the head are chosen under a budget, too."""
        return self.mixed and self.embedding_bits is None

    def table_bits(self, table_weights: float, other_weights: float) -> int:
        """Return the bits of the embedding and the head, which have ``table_weights`` weights together.

        By default these are 8, which hardly change the answers. If the tables then needed more bytes than all other
        weights, as in a small model with a large vocabulary, these are 5, and 5 with zero points too, which GGUF stores
        for at most 5 bits. Tables beside 8-bit layers have 8.

        Args:
            table_weights: Number of weights of the tables.
            other_weights: Number of all other weights of the model.
        """
        if self.embedding_bits is not None:
            return self.embedding_bits
        dominate = 8 * table_weights > self.bits * other_weights
        return 5 if self.bits < 8 and (dominate or not self.sym) else 8


class BlockTraining(Frozen):
    """Settings of a training of each block towards the output of the float block."""

    samples: int = Field(
        32, ge=2, le=100_000, description="sequences of calibration text from the train split, for solver and training"
    )
    epochs: float = Field(4.0, gt=0, le=1000, description="epochs of each block over the calibration text")
    batch_size: int = Field(2, ge=1, description="sequences per step")
    held_out: int = Field(4, ge=1, description="number of sequences held out to evaluate a block after each epoch")
    learning_rate: float = Field(
        2e-3, gt=0, le=1, description="peak learning rate of weights, in units of the quantization step"
    )


class NncfOptions(Frozen):
    """Settings of NNCF's torch backend for decoder weights that a checkpoint can hold."""

    mode: Literal["int4_sym", "int4_asym"] = Field("int4_sym", description="4 bits without or with zero points")
    group_size: GroupSize = Field(64, description="weights of a row that share a scale; -1: the whole row")
    awq: bool = Field(
        True, description="scale input columns with large activations before quantization (AWQ), where NNCF supports it"
    )
    scale_estimation: bool = Field(True, description="fit the scales to minimize the output error on calibration text")
    all_layers: bool = Field(False, description="the embedding and the head at 4 bits too, instead of 8")
    samples: int = Field(16, ge=1, le=100_000, description="sequences of calibration text from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")
    keep: tuple[str, ...] = Field((), description="layers to keep in float16, as patterns of names, e.g. `*.mlp.gate`")

    @property
    def equivalent(self) -> Quantization:
        """Return the same grid as `Quantization` settings, which plan layers and predict sizes."""
        return Quantization(
            method="rtn",
            bits=4,
            group_size=self.group_size,
            sym=self.mode == "int4_sym",
            act_order=False,
            samples=self.samples,
            sequence_length=self.sequence_length,
            embedding_bits=4 if self.all_layers else 8,
            embedding_group_size=256,
            keep=self.keep,
        )
