"""What the graph of a decoder needs to know of its config, and which decoders can be written at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

    from compress.checkpoints.checkpoint import Checkpoint

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Pre-norm decoders with rotary positions, RMS norms and a gated SiLU; SmolLM2 and its like are Llamas."""
_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the length of the text."""
_HEAD_UNIT = 16
"""ONNX Runtime's attention rotates no other heads."""


@dataclass(frozen=True)
class DecoderArchitecture:
    """A decoder's shape. ``windows`` has for each layer how many tokens it looks back, or -1 for all.

    ``experts`` of a block, of which each token passes ``experts_per_token``; 0 where blocks are dense.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    tied: bool
    windows: tuple[int, ...]
    config: Any
    experts: int = 0
    experts_per_token: int = 0

    @cached_property
    def rotary(self) -> tuple[np.ndarray, float]:
        """The angle of each pair for one position, [head_size / 2] float32, and the factor of cosine and sine."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        kind = self.config.rope_parameters["rope_type"]
        compute = LlamaRotaryEmbedding.compute_default_rope_parameters
        frequencies, factor = (compute if kind == "default" else ROPE_INIT_FUNCTIONS[kind])(self.config)
        return frequencies.float().numpy(), float(factor)


def check_writable(folder: Path) -> None:
    """Raise `ModelError` for a decoder whose graph cannot be written."""
    from compress.checkpoints.checkpoint import Checkpoint

    read_architecture(Checkpoint(folder))


def read_architecture(checkpoint: Checkpoint) -> DecoderArchitecture:
    """The architecture of a checkpoint. Raises `ModelError` for one that this writer doesn't know."""
    from transformers import AutoConfig

    name = next(iter(checkpoint.config.get("architectures") or ["no architecture"]))
    if name not in SUPPORTED:
        raise _refusal(checkpoint, f"{name} cannot be written as an ONNX decoder", ", ".join(SUPPORTED))
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refusal(
            checkpoint, f"config.json cannot be read: {error}", "the config that save_pretrained wrote"
        ) from error
    if config.hidden_act != "silu":
        raise _refusal(checkpoint, f"The activation is {config.hidden_act!r}", "hidden_act: silu")
    rotary = config.rope_parameters.get("rope_type")
    if rotary not in _ROTARY_TYPES:
        raise _refusal(checkpoint, f"The rotary positions are {rotary!r}", f"rope_type {', '.join(_ROTARY_TYPES)}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(checkpoint, "Only a part of each head is rotated", "partial_rotary_factor: 1.0")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size % _HEAD_UNIT:
        raise _refusal(checkpoint, f"Heads of {head_size} cannot be written", f"a multiple of {_HEAD_UNIT}")
    return DecoderArchitecture(
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=head_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        windows=_windows(config),
        config=config,
        experts=getattr(config, "num_local_experts", 0),
        experts_per_token=getattr(config, "num_experts_per_tok", 0),
    )


def _windows(config: Any) -> tuple[int, ...]:
    """Mistral has one window for all layers, Qwen names the type of each layer; Llama has none."""
    layers: int = config.num_hidden_layers
    size: int | None = getattr(config, "sliding_window", None)
    types: list[str] | None = getattr(config, "layer_types", None)
    if size is None:
        return (-1,) * layers
    if types is None:
        return (size,) * layers
    return tuple(size if kind == "sliding_attention" else -1 for kind in types)


def _refusal(checkpoint: Checkpoint, what: str, expected: str) -> ModelError:
    return ModelError(
        f"{what}.",
        where=str(checkpoint.folder / "config.json"),
        expected=expected,
        mend="ship it as a GPTQ checkpoint or GGUF instead, or add the architecture to compress/models/onnx_decoder",
    )
