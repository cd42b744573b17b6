"""Llama-like decoders in GGUF's terms: metadata, names of tensors, and the order of rows in queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from compress.errors import ModelError
from compress.formats.gguf.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

    from compress.checkpoints.checkpoint import Checkpoint

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of config.json -> GGUF's name."""
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_DENSE = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_ROUTER = "block_sparse_moe.gate"
_EXPERTS = "block_sparse_moe.experts"
_MIXTURE = (_ROUTER, *(f"{_EXPERTS}.{name}" for name in ("w1", "w3", "w2")))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def check_writable(folder: Path) -> None:
    """Raise `ModelError` for an architecture, or a tokenizer, that GGUF has no place for."""
    from compress.checkpoints.checkpoint import Checkpoint

    GgufArchitecture.of(Checkpoint(folder))
    check_tokenizer(folder)


@dataclass(frozen=True)
class GgufArchitecture:
    """A decoder as its `config.json` describes it, with transformers' defaults. ``where`` names that file."""

    config: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """That of a checkpoint. Raises `ModelError` for one that GGUF cannot express."""
        from transformers import AutoConfig

        where, kind = str(checkpoint.folder / "config.json"), checkpoint.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ModelError(
                f"The architecture {kind!r} cannot be written as GGUF here.",
                where=where,
                expected=f"model_type {', '.join(ARCHITECTURES)}",
            )
        return cls(AutoConfig.from_pretrained(checkpoint.folder).to_dict(), where)

    def __post_init__(self) -> None:
        """Raise `ModelError` for settings that GGUF cannot express."""
        kind, activation = self.config["model_type"], self.config.get("hidden_act", "silu")
        if activation != "silu":
            raise self._unknown("hidden_act", activation, "silu")
        window = self.config.get("sliding_window")
        if kind in ("mistral", "mixtral") and window is not None and window < self.config["max_position_embeddings"]:
            raise self._unknown("sliding_window", window, "null: llama.cpp attends to all of the text")
        if self._rotation not in ("default", "linear", "llama3"):
            raise self._unknown("rope_type", self._rotation, "default, linear or llama3")

    @property
    def name(self) -> str:
        """GGUF's name of the architecture."""
        return ARCHITECTURES[self.config["model_type"]]

    @property
    def blocks(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def tied(self) -> bool:
        """Whether the embedding table is the output layer too."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def experts(self) -> int:
        """How many experts a block has; 0 where it is dense."""
        return int(self.config.get("num_local_experts") or 0) if self.config["model_type"] == "mixtral" else 0

    def modules(self) -> list[str]:
        """Every module that has a weight, in the checkpoint's names, in the order of the forward pass.

        Experts are one module to llama.cpp; `parts` says which ones they are in the checkpoint.
        """
        inner = _ATTENTION + (_MIXTURE if self.experts else _DENSE) + _NORMS
        inner += _HEAD_NORMS if self.name == "qwen3" else ()
        layers = [f"model.layers.{index}.{name}" for index in range(self.blocks) for name in inner]
        return [EMBEDDING, *layers, "model.norm", *([] if self.tied else [HEAD])]

    def parts(self, module: str) -> list[str]:
        """The checkpoint's modules whose weights follow each other in a tensor of llama.cpp: experts, or one alone."""
        before, experts, leaf = module.partition(f"{_EXPERTS}.")
        return [f"{before}{experts}{number}.{leaf}" for number in range(self.experts)] if experts else [module]

    def is_router(self, module: str) -> bool:
        """Whether a module chooses experts: llama.cpp's own converter keeps its weight in 32 bits."""
        return module.endswith(f".{_ROUTER}")

    def names(self) -> TensorNameMap:
        """The `gguf` package's map from transformers' names to its own."""
        import gguf

        by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(by_name[self.name], self.blocks)

    def row_order(self, module: str) -> np.ndarray | None:
        """The rows in the order that llama.cpp keeps them, or None where it is the same.

        Its llama turns neighbouring pairs of a head; transformers turns the first half against the second.
        """
        if self.name != "llama" or not module.endswith((".q_proj", ".k_proj")):
            return None
        heads = int(self.config["num_attention_heads"]) if module.endswith(".q_proj") else self.key_heads
        pairs = np.arange(heads * self.head_size).reshape(heads, 2, self.head_size // 2)
        rows: np.ndarray = pairs.swapaxes(1, 2).reshape(-1)
        return rows

    def add_metadata(self, writer: GGUFWriter) -> None:
        """Add the sizes and constants of the architecture."""
        config = self.config
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(self.blocks)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(self.key_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_rope_freq_base(float(self._rotary["rope_theta"]))
        if self._rotation == "linear":
            from gguf import RopeScalingType

            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self._rotary["factor"]))

    def rotary_factors(self) -> np.ndarray | None:
        """What each frequency is divided by, [head_size / 2] float32, where Llama 3's scaling is used.

        Long waves are stretched by ``factor``, short ones not, and those between by a share of it.
        """
        if self._rotation != "llama3":
            return None
        rotary = self._rotary
        base, factor = float(rotary["rope_theta"]), float(rotary["factor"])
        low, high = float(rotary["low_freq_factor"]), float(rotary["high_freq_factor"])
        frequencies = base ** (-np.arange(0, self.head_size, 2) / self.head_size)
        turns = rotary["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        factors: np.ndarray = (1 / ((1 - share) / factor + share)).astype(np.float32)
        return factors

    @property
    def _rotary(self) -> dict[str, Any]:
        return dict(self.config["rope_parameters"])

    @property
    def _rotation(self) -> str:
        return str(self._rotary.get("rope_type", "default"))

    def _unknown(self, field: str, found: object, expected: str) -> ModelError:
        return ModelError(f"GGUF cannot say {field}: {found!r}.", where=self.where, expected=expected)
