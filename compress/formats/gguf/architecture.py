"""Mapping of a decoder to GGUF: its metadata and the names of its tensors in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from compress.formats.gguf.families import FAMILIES, REFUSED, Family, TensorRule, head_size
from compress.formats.gguf.tokenizer import check_tokenizer
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

    from compress.models.checkpoint import Checkpoint

_STACKED = re.compile(r"(.*)(\.experts|\.norms)\.(\d+)\.(.+)")
"""Tensors of several experts or norms that are stacked in one tensor of llama.cpp."""
_ALWAYS_FLOAT32 = re.compile(
    r".*(\.bias|_norm\.weight|ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|conv1d\.weight|shortconv\.conv\.weight"
    r"|ssm_[ad]|sinks\.weight)"
)
"""Tensors that llama.cpp's own converter stores in 32 bits, matrices or not."""
_BLOCK_ORDER = (
    *("attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_gate_inp", "ffn_gate", "ffn_gate_exps", "ffn_up", "ffn_up_exps", "ffn_down", "ffn_down_exps"),
    *("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
)
_OPTIONAL: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("attention.layer_norm_epsilon", float, ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    ("expert_feed_forward_length", int, ("moe_intermediate_size",)),
    ("expert_shared_feed_forward_length", int, ("shared_expert_intermediate_size", "shared_intermediate_size")),
    ("expert_shared_count", int, ("n_shared_experts", "moe_num_shared_experts")),
    ("leading_dense_block_count", int, ("first_k_dense_replace", "num_dense_layers")),
    ("expert_weights_scale", float, ("routed_scaling_factor",)),
    ("expert_weights_norm", bool, ("norm_topk_prob",)),
    ("expert_group_count", int, ("n_group",)),
    ("expert_group_used_count", int, ("topk_group",)),
    ("attn_logit_softcapping", float, ("attn_logit_softcapping",)),
    ("final_logit_softcapping", float, ("final_logit_softcapping",)),
    ("attention.scale", float, ("attention_multiplier",)),
    ("embedding_scale", float, ("embedding_multiplier",)),
    ("residual_scale", float, ("residual_multiplier",)),
    ("logit_scale", float, ("logits_scaling", "logit_scale")),
    ("ssm.conv_kernel", int, ("conv_kernel", "mamba_d_conv")),
    ("ssm.state_size", int, ("state_size", "mamba_d_state", "ssm_state_size")),
    ("ssm.time_step_rank", int, ("time_step_rank", "mamba_dt_rank")),
    ("ssm.group_count", int, ("n_groups", "mamba_n_groups")),
)
"""Metadata that are written if the config has one of the fields."""


def check_writable(folder: Path) -> None:
    """Raise `ModelError` for an architecture or a tokenizer that GGUF cannot store."""
    from compress.models.checkpoint import Checkpoint

    GgufArchitecture.of(Checkpoint(folder)).tensors()
    check_tokenizer(folder)


@dataclass(frozen=True)
class NamedTensor:
    """Tensor of the file, and the checkpoint tensors that it consists of: one, or several stacked ones."""

    name: str
    sources: tuple[str, ...]
    piece: TensorRule | None

    @property
    def always_float32(self) -> bool:
        """Return whether llama.cpp requires the tensor, a small one, in 32 bits."""
        return _ALWAYS_FLOAT32.fullmatch(self.name) is not None


@dataclass(frozen=True)
class GgufArchitecture:
    """Decoder as transformers builds it from a config.

    Attributes:
        config: Config of transformers.
        where: Path of the config, for error messages.
        shapes: Shapes of the tensors by their names in files.
        tied: Modules whose tied weights may be stored again.
        ignored: Patterns of tensors that older versions wrote and no reader uses.
    """

    config: PretrainedConfig
    where: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Return the architecture of a checkpoint; raise `ModelError` if GGUF cannot express it."""
        from compress.models.meta_model import build_decoder_on_meta, stored_shapes
        from compress.models.transformer_pruning import is_pruned

        where, kind = str(checkpoint.folder / "config.json"), checkpoint.config.get("model_type")
        if kind not in FAMILIES:
            reason = f": {REFUSED[kind]}" if kind in REFUSED else ""
            raise ModelError(
                f"The architecture {kind!r} cannot be written as GGUF here{reason}.",
                where=where,
                expected=f"model_type {', '.join(FAMILIES)}",
            )
        model = build_decoder_on_meta(checkpoint.folder)
        if is_pruned(model.config):
            raise ModelError(
                f"The {kind} was pruned in a way that neither its config nor GGUF can express.",
                where=where,
                expected="the same number of heads and neurons in all layers, as the config states",
            )
        ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        tied = frozenset(name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", None) or ())
        return cls(model.config, where, stored_shapes(model), tied, ignored)

    def __post_init__(self) -> None:
        """Raise `ModelError` for settings that GGUF cannot express."""
        for name in ("hidden_activation", "hidden_act", "activation_function", "activation"):
            activation = getattr(self.config, name, None)
            if isinstance(activation, str):
                if self.family.activations and activation not in self.family.activations:
                    raise self._unsupported(name, activation, " or ".join(self.family.activations))
                break
        windowed = self._window is not None and self._window < self.config.max_position_embeddings
        if windowed and any(self._windowed_layers) and not self._windows_are_known:
            raise self._unsupported("sliding_window", self._window, "null: llama.cpp attends to all of the text")
        if self._rotation not in ("default", "linear", "llama3", "yarn", "longrope"):
            raise self._unsupported("rope_type", self._rotation, "default, linear, llama3, yarn or longrope")
        for name, setting in self.family.built_in.items():
            expected = setting(self.config) if callable(setting) else setting
            value = getattr(self.config, name, expected)
            if value != expected and value is not None:
                raise self._unsupported(name, value, f"{expected!r}, with which llama.cpp computes this architecture")

    @property
    def family(self) -> Family:
        """Family of decoders with the settings specific to the architecture."""
        return FAMILIES[self.config.model_type]

    @property
    def name(self) -> str:
        """GGUF's name of the architecture."""
        return self.family.name

    def is_ignored(self, tensor: str) -> bool:
        """Return whether no reader uses a tensor of that name, such as a table of rotary frequencies."""
        return any(re.search(pattern, tensor) for pattern in (r"rotary_emb\.inv_freq", *self.ignored))

    def tensors(self) -> list[NamedTensor]:
        """Return every tensor of the file in file order; raise `ModelError` for a tensor without a GGUF name."""
        import gguf

        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[self.name], self.config.num_hidden_layers)
        sources_by_name: dict[str, tuple[dict[int, str], TensorRule | None]] = {}
        for source in self.shapes:
            # Several rules split one tensor; a tensor without a rule keeps its name.
            targets: list[tuple[str, TensorRule | None]] = [
                (source if piece.name is None else match.expand(piece.name), piece)
                for piece in self.family.pieces
                if (match := re.fullmatch(piece.match, source)) is not None
            ]
            for target, piece in targets or [(source, None)]:
                # Experts are numbered in the checkpoint and stacked in the file.
                stacked = _STACKED.fullmatch(target)
                number = int(stacked[3]) if stacked else 0
                original_name = f"{stacked[1]}{stacked[2]}.{stacked[4]}".replace(".norms.", ".") if stacked else target
                gguf_name = names.get_name(original_name, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise ModelError(f"GGUF has no name for the tensor {source!r}.", where=self.where)
                sources_by_name.setdefault(gguf_name, ({}, piece))[0][number] = source
        tensors = (
            NamedTensor(gguf_name, tuple(sources[number] for number in sorted(sources)), piece)
            for gguf_name, (sources, piece) in sources_by_name.items()
        )
        return sorted(tensors, key=_sort_key)

    def add_metadata(self, writer: GGUFWriter) -> None:
        """Add the sizes and constants of the architecture."""
        from gguf import GGUFValueType

        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
        kinds |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
        for key, value in self.metadata().items():
            writer.add_key_value(f"{self.name}.{key}", value, kinds[type(value)])

    def metadata(self) -> dict[str, Any]:
        """Return sizes and constants in file order, by their names without the architecture's prefix."""
        config, heads = self.config, self._first("num_attention_heads", kind=int)
        experts = self._first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", kind=int)
        size = head_size(config) if heads else None
        rotated = (self._rotary.get("partial_rotary_factor") or 1.0) if "rope_theta" in self._rotary else None
        metadata: dict[str, Any] = {
            "context_length": self._first("max_position_embeddings", "max_seq_len", kind=int),
            "embedding_length": int(config.hidden_size),
            "block_count": int(config.num_hidden_layers),
            "feed_forward_length": self._first("intermediate_size", "n_inner", "ffn_hidden_size", kind=int)
            or 4 * config.hidden_size,
            "attention.head_count": heads,
            "attention.head_count_kv": self._first("num_key_value_heads", kind=int) or heads,
            "attention.key_length": size,
            "attention.value_length": size,
            "rope.dimension_count": None if size is None or rotated is None else int(size * float(rotated)),
            "attention.layer_norm_rms_epsilon": self._first("rms_norm_eps", "norm_eps", kind=float),
            "vocab_size": int(config.vocab_size),
            "expert_count": experts or None,
            "expert_used_count": self._first("num_experts_per_tok", "moe_k", "moe_topk", kind=int) if experts else None,
            **self._rotary_metadata(),
            **{key: self._first(*names, kind=kind) for key, kind, names in _OPTIONAL},
        }
        if self._windows_are_known:
            metadata["attention.sliding_window"] = int(self._window or config.max_position_embeddings)
            metadata["attention.sliding_window_pattern"] = self._windowed_layers
        metadata |= {key: value(config) if callable(value) else value for key, value in self.family.keys.items()}
        # Settings of experts make llama.cpp expect expert tensors.
        unset = "expert_" if metadata["expert_count"] is None else " "
        return {key: value for key, value in metadata.items() if value is not None and not key.startswith(unset)}

    def _first(self, *names: str, kind: type) -> Any:
        """Return the first config field that is set, converted to ``kind``."""
        values = (getattr(self.config, name, None) for name in names)
        first = next((value for value in values if value is not None), None)
        return None if first is None else kind(first)

    def _rotary_metadata(self) -> dict[str, Any]:
        rotary = self._rotary
        metadata: dict[str, Any] = {}
        if "rope_theta" in rotary:
            metadata["rope.freq_base"] = float(rotary["rope_theta"])
        if self._rotation in ("linear", "yarn", "longrope"):
            metadata["rope.scaling.type"] = self._rotation
        if self._rotation in ("linear", "yarn"):
            metadata["rope.scaling.factor"] = float(rotary["factor"])
        if self._rotation in ("yarn", "longrope"):
            length = rotary.get("original_max_position_embeddings") or self.config.original_max_position_embeddings
            metadata["rope.scaling.original_context_length"] = int(length)
        if self._rotation == "yarn":
            for name in ("beta_fast", "beta_slow"):
                if rotary.get(name) is not None:
                    metadata[f"rope.scaling.yarn_{name}"] = float(rotary[name])
        # LongRoPE scales attention by the logarithm of the stretch (Ding et al. 2024).
        if self._rotation == "longrope":
            length = metadata["rope.scaling.original_context_length"]
            stretch = self.config.max_position_embeddings / length
            attention = math.sqrt(1 + math.log(stretch) / math.log(length)) if stretch > 1 else 1.0
            metadata["rope.scaling.attn_factor"] = rotary.get("attention_factor") or attention
        sliding = self._rotary_of("sliding_attention")
        if sliding is not None:
            metadata["rope.freq_base_swa"] = float(sliding["rope_theta"])
        return metadata

    def factors(self) -> dict[str, np.ndarray]:
        """Return the divisors of the rotary frequencies, float32 [rotated / 2], by their tensor names."""
        factors: dict[str, np.ndarray] = {}
        if (llama3 := self.rotary_factors()) is not None:
            factors["rope_freqs.weight"] = llama3
        if self._rotation == "longrope":
            for name in ("long", "short"):
                factors[f"rope_factors_{name}.weight"] = np.asarray(self._rotary[f"{name}_factor"], np.float32)
        return factors

    def rotary_factors(self) -> np.ndarray | None:
        """Return the divisors of the rotary frequencies in Llama 3's scaling, float32 [head_size / 2], or None.

        Long wavelengths are stretched by ``factor``, short ones stay, and those between are interpolated.
        """
        if self._rotation != "llama3":
            return None
        rotary, size = self._rotary, head_size(self.config)
        base, factor = float(rotary["rope_theta"]), float(rotary["factor"])
        low, high = float(rotary["low_freq_factor"]), float(rotary["high_freq_factor"])
        frequencies = base ** (-np.arange(0, size, 2) / size)
        # Number of turns that a frequency makes within the original context length.
        turns = rotary["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        factors: np.ndarray = (1 / ((1 - share) / factor + share)).astype(np.float32)
        return factors

    def _rotary_of(self, kind: str) -> dict[str, Any] | None:
        """Return the rotary parameters of layers of ``kind``, if layers of several kinds rotate differently."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return dict(parameters[kind]) if isinstance(parameters.get(kind), dict) else None

    @property
    def _rotary(self) -> dict[str, Any]:
        parameters = self._rotary_of("full_attention")
        return dict(getattr(self.config, "rope_parameters", None) or {}) if parameters is None else parameters

    @property
    def _rotation(self) -> str:
        return str(self._rotary.get("rope_type", "default"))

    @property
    def _window(self) -> int | None:
        window = getattr(self.config, "sliding_window", None)
        return None if window is None else int(window)

    @property
    def _windowed_layers(self) -> list[bool]:
        """Return for each layer whether it uses sliding-window attention."""
        kinds = getattr(self.config, "layer_types", None)
        if self._window is None or kinds is None:
            return [self._window is not None] * self.config.num_hidden_layers
        return [kind == "sliding_attention" for kind in kinds]

    @property
    def _windows_are_known(self) -> bool:
        windows = self.family.windows
        return windows(self.config) if callable(windows) else windows

    def _unsupported(self, field: str, value: object, expected: str) -> ModelError:
        return ModelError(f"GGUF cannot express {field}: {value!r}.", where=self.where, expected=expected)


def _sort_key(tensor: NamedTensor) -> tuple[int, int, int]:
    """Return the sort key of a tensor: tables first, then block by block, then the last norm and the head."""
    parts = tensor.name.split(".")
    if parts[0] != "blk":
        return (2 if parts[0].startswith("output") else 0), 0, int(parts[0] == "output")
    leaf = parts[2]
    return 1, int(parts[1]), _BLOCK_ORDER.index(leaf) if leaf in _BLOCK_ORDER else len(_BLOCK_ORDER)
