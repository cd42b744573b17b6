"""Families of decoders in llama.cpp, and where their tensors and settings differ from transformers'.

A row contains only what config and names do not determine: another row order, split tensors, and constants that
llama.cpp uses whatever the file contains. `architecture` handles the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Config = Any
"""Config of transformers, whose `attribute_map` translates old attribute names."""
Values = Callable[[Any, Config], Any]


@dataclass(frozen=True)
class TensorRule:
    """Conversion of the tensors whose whole names match ``match``; several rules for one tensor split it.

    Attributes:
        match: Pattern of checkpoint names.
        name: Name in the `gguf` package's map, with the match's groups.
        rows: Function that returns the source rows in the file's order; it applies to integers, too.
        values: Function that returns the stored values of a float tensor. Integers are refused unless ``integers``.
        integers: Whether integers already have llama.cpp's shape.
    """

    match: str
    name: str | None = None
    rows: Callable[[Config, int], np.ndarray] | None = None
    values: Values | None = None
    integers: bool = False


@dataclass(frozen=True)
class Family:
    """Family of decoders.

    Attributes:
        name: GGUF's name.
        pieces: Rules for tensors.
        keys: Additional metadata, each a value or a function of the config.
        activations: Activations that llama.cpp can compute, by transformers' names.
        windows: Whether llama.cpp uses sliding windows in the layers whose config requests them.
        built_in: Values of other config fields that llama.cpp assumes.
    """

    name: str
    pieces: tuple[TensorRule, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu",)
    windows: bool | Callable[[Config], bool] = False
    built_in: Mapping[str, Any] = field(default_factory=dict)


def head_size(config: Config) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _pairs(config: Config, rows: int) -> np.ndarray:
    """Return the row order for llama.cpp's rotation of neighbouring pairs; transformers rotates halves of a head."""
    return np.arange(rows).reshape(-1, 2, head_size(config) // 2).swapaxes(1, 2).reshape(-1)


def _by_head(config: Config, rows: int) -> np.ndarray:
    """Return the order that turns query, key and value per head into all queries, all keys, all values."""
    return np.arange(rows).reshape(-1, 3, head_size(config)).swapaxes(0, 1).reshape(-1)


def _falcon(config: Config, rows: int) -> np.ndarray:
    """Return the order that turns Falcon's groups of queries, key and value into all queries, all keys, all values."""
    size, heads = head_size(config), config.num_attention_heads
    groups = (rows // size - heads) // 2
    parts = np.arange(rows).reshape(groups, heads // groups + 2, size)
    return np.concatenate([parts[:, :-2].reshape(-1), parts[:, -2].reshape(-1), parts[:, -1].reshape(-1)])


def _half(number: int) -> Values:
    return lambda tensor, _: tensor.chunk(2, dim=-2)[number]


def _every_other(first: int) -> Values:
    """Return the gates or up-projections, which alternate in gpt-oss's experts [experts, columns, rows]."""
    return lambda tensor, _: tensor.transpose(1, -1)[:, first::2] if tensor.ndim > 2 else tensor[:, first::2]


def _latent(keys: bool) -> Values:
    """Return the transposed keys or the values of each head [heads, ...] from DeepSeek's joint up-projection."""

    def split(tensor: Any, config: Config) -> Any:
        both = tensor.view(config.num_attention_heads, -1, tensor.shape[-1])
        width = config.qk_nope_head_dim
        return both[:, :width].transpose(1, 2) if keys else both[:, width:]

    return split


def _three_of_four(config: Config) -> list[int]:
    return [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]


def _falcon_groups(config: Config) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _key_heads_by_layer(config: Config) -> list[int]:
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


_Q_AND_K = TensorRule(r".*\.self_attn\.[qk]_proj\.(weight|bias)", rows=_pairs)
_PLUS_ONE = TensorRule(r".*norm\.weight", values=lambda tensor, _: tensor + 1)
_ROUTER_BIAS = TensorRule(r"(.*)\.e_score_correction_bias", r"\1.e_score_correction.bias")
_GATE_UP = tuple(
    TensorRule(rf"(.*)\.{module}\.input_linear\.weight", rf"\1.{target}.{name}.weight", values=_half(number))
    for module, target in (("block_sparse_moe", "mlp.experts"), ("shared_mlp", "mlp.shared_expert"))
    for number, name in enumerate(("gate_proj", "up_proj"))
)
_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_SQUEEZED = TensorRule(r".*\.(conv1d|conv\.conv)\.weight", values=lambda tensor, _: tensor.squeeze(1))
_DECAY = TensorRule(r".*\.A_log", values=lambda tensor, _: -tensor.float().exp())
_STEP = TensorRule(r"(.*)\.dt_bias", r"\1.dt_proj.bias")
_SSM = (_DECAY, _SQUEEZED)
_SSM2 = (
    TensorRule(r".*\.A_log", values=lambda tensor, _: -tensor.float().exp()[:, None]),
    TensorRule(r".*\.D", values=lambda tensor, _: tensor[:, None]),
    *(_STEP, _SQUEEZED),
)
_NO_ATTENTION = {
    "context_length": 2**20,
    "feed_forward_length": 0,
    "attention.head_count": 0,
    "attention.layer_norm_rms_epsilon": lambda config: config.layer_norm_epsilon,
}
_EXPERT_WIDTH = {"expert_feed_forward_length": lambda config: config.intermediate_size}
_DEEPSEEK = {
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": lambda config: config.kv_lora_rank,
    "attention.q_lora_rank": lambda config: config.q_lora_rank,
    "attention.key_length": lambda config: config.kv_lora_rank + config.qk_rope_head_dim,
    "attention.value_length": lambda config: config.kv_lora_rank,
    "attention.key_length_mla": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
    "attention.value_length_mla": lambda config: config.v_head_dim,
    "rope.dimension_count": lambda config: config.qk_rope_head_dim,
}
_KV_B = (
    TensorRule(r"(.*)\.kv_b_proj\.weight", r"\1.k_b_proj.weight", values=_latent(keys=True)),
    TensorRule(r"(.*)\.kv_b_proj\.weight", r"\1.v_b_proj.weight", values=_latent(keys=False)),
)
_SIGMOID = {"expert_gating_func": 2}
_NO_SHARED_HEADS = {"num_key_value_heads": lambda config: config.num_attention_heads}
_GEMMA_HEADS = {"query_pre_attn_scalar": lambda config: head_size(config)}
_GROUPED_NORM = TensorRule(r".*\.mixer\.norm\.weight", values=lambda tensor, config: tensor.view(config.n_groups, -1))
_MAMBA_NORM = TensorRule(
    r".*\.mamba\.norm\.weight", values=lambda tensor, config: tensor.view(config.mamba_n_groups, -1)
)
_HYBRID = {
    "attention.head_count_kv": _key_heads_by_layer,
    "ssm.inner_size": lambda config: config.mamba_expand * config.hidden_size,
    "ssm.time_step_rank": lambda config: config.mamba_n_heads,
    "rope.scaling.finetuned": lambda config: getattr(config, "position_embedding_type", "rope") == "rope",
}
_LINEAR_ATTENTION = (
    *(_DECAY, _STEP, _SQUEEZED),
    TensorRule(r"(?!.*linear_attn\.norm).*norm\.weight", values=lambda tensor, _: tensor + 1),
)
_LINEAR_KEYS = {
    "ssm.conv_kernel": lambda config: config.linear_conv_kernel_dim,
    "ssm.state_size": lambda config: config.linear_key_head_dim,
    "ssm.group_count": lambda config: config.linear_num_key_heads,
    "ssm.time_step_rank": lambda config: config.linear_num_value_heads,
    "ssm.inner_size": lambda config: config.linear_value_head_dim * config.linear_num_value_heads,
    "attention.recurrent_layers": lambda config: [kind == "linear_attention" for kind in config.layer_types],
    "full_attention_interval": lambda config: 4,
}
_LLAMA = Family("llama", (_Q_AND_K,))
_PLAIN = {
    "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2", "glm": "chatglm", "glm4": "glm4", "ernie4_5": "ernie4_5",
    "hunyuan_v1_dense": "hunyuan-dense", "seed_oss": "seed_oss", "helium": "llama", "exaone": "exaone",
}  # fmt: skip
"""Families that need no rule, by transformers' names."""

REFUSED = {"phimoe": "llama.cpp sends tokens to its experts in another way than transformers"}
"""Architectures that llama.cpp opens but computes differently."""

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "ministral", "internlm3", "cwm"), _LLAMA),
    **{kind: Family(name) for kind, name in _PLAIN.items()},
    "qwen2_moe": Family("qwen2moe", built_in={"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "qwen3_moe": Family("qwen3moe", built_in={"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "gemma": Family("gemma", (_PLUS_ONE,), activations=_GELU),
    "gemma2": Family("gemma2", (_PLUS_ONE,), activations=_GELU, windows=True, built_in=_GEMMA_HEADS),
    "gemma3_text": Family("gemma3", (_PLUS_ONE,), activations=_GELU, windows=True, built_in=_GEMMA_HEADS),
    "phi": Family("phi2", activations=_GELU),
    "phi3": Family("phi3", keys={"attention.sliding_window": 0}),
    "smollm3": Family("smollm3", (_Q_AND_K,), built_in={"no_rope_layers": _three_of_four}),
    "olmo": Family(
        "olmo",
        (_Q_AND_K,),
        {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": lambda config: config.clip_qkv},
    ),
    "olmo3": Family("olmo2", windows=True),
    "olmoe": Family("olmoe", built_in={"norm_topk_prob": False, "clip_qkv": None, **_NO_SHARED_HEADS}),
    "granite": Family("granite", (_Q_AND_K,)),
    "granitemoe": Family("granitemoe", (_Q_AND_K, *_GATE_UP)),
    "starcoder2": Family("starcoder2", activations=_GELU),
    "gpt2": Family(
        "gpt2",
        (TensorRule(r".*\.(c_attn|c_proj|c_fc)\.weight", values=lambda tensor, _: tensor.T, integers=True),),
        activations=_GELU,
        built_in={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_bigcode": Family(
        "starcoder", keys={"attention.head_count_kv": 1}, activations=_GELU, built_in={"multi_query": True}
    ),
    "gpt_neox": Family(
        "gptneox",
        (TensorRule(r".*\.query_key_value\.(weight|bias)", rows=_by_head),),
        {"use_parallel_residual": lambda config: config.use_parallel_residual},
        activations=_GELU,
    ),
    "bloom": Family(
        "bloom",
        (
            TensorRule(r"transformer\.(.*)\.query_key_value\.(weight|bias)", r"\1.query_key_value.\2", rows=_by_head),
            TensorRule(r"transformer\.(.*)", r"\1"),
        ),
        {"context_length": 2048, "feed_forward_length": lambda config: 4 * config.hidden_size},
        activations=(),
        built_in={"apply_residual_connection_post_layernorm": False},
    ),
    "mpt": Family(
        "mpt",
        keys={
            "feed_forward_length": lambda config: config.expansion_ratio * config.hidden_size,
            "attention.max_alibi_bias": lambda config: float(config.attn_config.alibi_bias_max),
            "attention.clamp_kqv": lambda config: config.attn_config.clip_qkv,
        },
        activations=(),
    ),
    "falcon": Family(
        "falcon",
        (TensorRule(r".*\.query_key_value\.weight", rows=_falcon),),
        {"attention.head_count_kv": _falcon_groups, "tensor_data_layout": "jploski"},
        activations=_GELU,
        built_in={"alibi": False, "parallel_attn": True, "bias": False},
    ),
    "stablelm": Family("stablelm", keys={"use_parallel_residual": lambda config: config.use_parallel_residual}),
    "cohere": Family(
        "command-r",
        keys={"rope.scaling.type": "none"},
        built_in={"use_qk_norm": lambda config: config.num_hidden_layers >= 64},
    ),
    "cohere2": Family("cohere2", keys={"rope.scaling.type": "none"}, windows=True),
    "nemotron": Family(
        "nemotron",
        (_PLUS_ONE,),
        {"attention.layer_norm_epsilon": lambda config: config.norm_eps, "attention.layer_norm_rms_epsilon": None},
        activations=("relu2",),
    ),
    "glm4_moe": Family("glm4moe", (_ROUTER_BIAS,), _SIGMOID),
    "exaone4": Family("exaone4", windows=lambda config: config.num_hidden_layers == 64),
    "arcee": Family("arcee", (_Q_AND_K,), activations=("relu2",)),
    "dots1": Family("dots1", (_ROUTER_BIAS,), _SIGMOID, built_in=_NO_SHARED_HEADS),
    "deepseek_v2": Family("deepseek2", _KV_B, {**_DEEPSEEK, "expert_gating_func": 1}),
    "deepseek_v3": Family("deepseek2", (*_KV_B, _ROUTER_BIAS), {**_DEEPSEEK, **_SIGMOID}),
    "minicpm3": Family(
        "minicpm3",
        keys={
            "attention.kv_lora_rank": lambda config: config.kv_lora_rank,
            "attention.q_lora_rank": lambda config: config.q_lora_rank,
            "attention.key_length": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
            "rope.dimension_count": lambda config: config.qk_rope_head_dim,
        },
        built_in={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    ),
    "gpt_oss": Family(
        "gpt-oss",
        (
            TensorRule(r"(.*)\.sinks", r"\1.sinks.weight"),
            *(
                TensorRule(rf"(.*)\.gate_up_proj{bias}", rf"\1.{name}.{leaf}", values=_every_other(first))
                for bias, leaf in (("", "weight"), ("_bias", "bias"))
                for first, name in enumerate(("gate_proj", "up_proj"))
            ),
            TensorRule(r"(.*)\.down_proj", r"\1.down_proj.weight", values=lambda tensor, _: tensor.transpose(-1, -2)),
            TensorRule(r"(.*)\.down_proj_bias", r"\1.down_proj.bias"),
        ),
        _EXPERT_WIDTH,
        windows=True,
    ),
    "lfm2": Family(
        "lfm2",
        (_SQUEEZED,),
        {
            "attention.head_count_kv": _key_heads_by_layer,
            "shortconv.l_cache": lambda config: config.conv_L_cache,
        },
        activations=(),
    ),
    "mamba": Family(
        "mamba",
        _SSM,
        {
            **_NO_ATTENTION,
            "ssm.inner_size": lambda config: config.intermediate_size,
            "ssm.dt_b_c_rms": lambda config: config.model_type == "falcon_mamba",
        },
    ),
    "mamba2": Family(
        "mamba2",
        (*_SSM2, _GROUPED_NORM),
        {
            **_NO_ATTENTION,
            "ssm.inner_size": lambda config: config.expand * config.hidden_size,
            "ssm.time_step_rank": lambda config: config.num_heads,
        },
    ),
}
FAMILIES |= {
    "falcon_mamba": FAMILIES["mamba"],
    "ministral3": Family(
        "mistral3",
        (_Q_AND_K,),
        {"attention.temperature_scale": lambda config: config.rope_parameters.get("llama_4_scaling_beta")},
    ),
    "granitemoeshared": FAMILIES["granitemoe"],
    "granitemoehybrid": Family(
        "granitehybrid",
        (_Q_AND_K, *_GATE_UP, *_SSM2, _MAMBA_NORM),
        _HYBRID,
        built_in={"num_local_experts": lambda config: max(config.num_local_experts, 1)},
    ),
    "jais2": Family("jais2", activations=("relu2",)),
    "solar_open": FAMILIES["glm4_moe"],
    "hunyuan_v1_moe": Family("hunyuan-moe", keys=_EXPERT_WIDTH),
    "ernie4_5_moe": Family(
        "ernie4_5-moe",
        (
            TensorRule(
                r"(.*)\.moe_statics\.e_score_correction_bias",
                r"\1.moe_statics.e_score_correction.bias",
                values=lambda tensor, _: tensor[0],
            ),
        ),
        {
            "interleave_moe_layer_step": lambda config: config.moe_layer_interval,
            "leading_dense_block_count": lambda config: config.moe_layer_start_index,
            "expert_shared_feed_forward_length": lambda config: (
                config.moe_num_shared_experts * config.moe_intermediate_size
            ),
        },
    ),
    "minimax_m2": Family("minimax-m2", (_ROUTER_BIAS,), {**_SIGMOID, **_EXPERT_WIDTH}),
    "exaone_moe": Family("exaone-moe", (_ROUTER_BIAS,), _SIGMOID, windows=True),
    "lfm2_moe": Family(
        "lfm2moe",
        (
            _SQUEEZED,
            *(
                TensorRule(rf"(.*)\.feed_forward\.(experts\.\d+)\.{short}\.weight", rf"\1.mlp.\2.{name}.weight")
                for short, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
            ),
            TensorRule(r"(.*)\.expert_bias", r"\1.expert_bias.bias"),
        ),
        {**FAMILIES["lfm2"].keys, **_SIGMOID},
        activations=(),
        built_in={"norm_topk_prob": True, "routed_scaling_factor": 1.0},
    ),
    "jamba": Family(
        "jamba",
        _SSM,
        {
            "attention.head_count_kv": _key_heads_by_layer,
            "ssm.inner_size": lambda config: config.mamba_expand * config.hidden_size,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        (*_SSM2, _GROUPED_NORM),
        {
            "attention.head_count_kv": _key_heads_by_layer,
            "feed_forward_length": lambda config: [
                config.intermediate_size if kind == "mlp" else 0 for kind in config.layer_types
            ],
            "attention.layer_norm_epsilon": lambda config: config.layer_norm_epsilon,
            "attention.layer_norm_rms_epsilon": lambda config: config.layer_norm_epsilon,
            "ssm.inner_size": lambda config: config.mamba_num_heads * config.mamba_head_dim,
            "ssm.time_step_rank": lambda config: config.mamba_num_heads,
            "expert_count": None,
        },
        activations=("relu2",),
        built_in={"layer_types": lambda config: [kind for kind in config.layer_types if kind != "moe"]},
    ),
    "qwen3_5_text": Family(
        "qwen35",
        _LINEAR_ATTENTION,
        {**_LINEAR_KEYS, "rope.dimension_sections": lambda config: [*config.rope_parameters["mrope_section"], 0][:4]},
        built_in={"linear_num_value_heads": lambda config: config.linear_num_key_heads},
    ),
    "qwen3_next": Family(
        "qwen3next",
        (
            *_LINEAR_ATTENTION,
            TensorRule(
                r"(.*)\.in_proj_qkvz\.weight", r"\1.in_proj_qkv.weight", rows=lambda config, _: _joint(config)[0]
            ),
            TensorRule(r"(.*)\.in_proj_qkvz\.weight", r"\1.in_proj_z.weight", rows=lambda config, _: _joint(config)[1]),
        ),
        _LINEAR_KEYS,
    ),
}


def _joint(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of all queries, keys and values, and that of all gates, from groups that contain all four."""
    keys, group = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
    values = group * config.linear_value_head_dim
    parts = np.arange(config.linear_num_key_heads * 2 * (keys + values)).reshape(config.linear_num_key_heads, -1)
    sections = np.split(parts, np.cumsum([keys, keys, values]), axis=1)
    return np.concatenate([part.reshape(-1) for part in sections[:3]]), sections[3].reshape(-1)
