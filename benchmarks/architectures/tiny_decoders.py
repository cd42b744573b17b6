"""Create tiny decoders of many architectures with random weights.

They have two layers, a hidden size of 64, four heads of 16 and a vocabulary of 352. `DECODERS` maps each name to
transformers' `model_type` and the config fields that differ from `COMMON`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 352
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
HALF_ROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
TRAINED_LENGTH = {"original_max_position_embeddings": 64}
ROPE_BY_LAYER_TYPE = {"sliding_attention": {**ROPE, "rope_theta": 10000.0}, "full_attention": ROPE}
ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.5,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    **LATENT_ATTENTION,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | TRAINED_LENGTH}),
    "llama-yarn": ("llama", {"rope_parameters": YARN | TRAINED_LENGTH}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", ALTERNATING | {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        ALTERNATING | {"query_pre_attn_scalar": 16, "rope_parameters": ROPE_BY_LAYER_TYPE},
    ),
    "phi": ("phi", HALF_ROPE | {"num_key_value_heads": 4}),
    "phi3": ("phi3", {"original_max_position_embeddings": 256, "sliding_window": None}),
    "phi4-mini": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "sliding_window": None,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.75},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1]}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ALTERNATING),
    "olmoe": ("olmoe", EXPERTS | {"num_key_value_heads": 4}),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", GRANITE | EXPERTS),
    "granitemoehybrid": (
        "granitemoehybrid",
        GRANITE | EXPERTS | MAMBA2 | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    ),
    "gpt_oss": ("gpt_oss", EXPERTS | ALTERNATING | {"rope_parameters": ROPE}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", HALF_ROPE),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "falcon": ("falcon", {}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("stablelm", HALF_ROPE),
    "stablelm2": ("stablelm", HALF_ROPE | {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", ALTERNATING | {"logit_scale": 0.3}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        EXPERTS | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1},
    ),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "falcon_h1": ("falcon_h1", MAMBA2 | {"mamba_d_ssm": 128}),
    "jamba": (
        "jamba",
        EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron": ("nemotron", HALF_ROPE),
    "glm": ("glm", HALF_ROPE),
    "glm4": ("glm4", HALF_ROPE),
    "glm4_moe": ("glm4_moe", DEEPSEEK | HALF_ROPE | {"num_key_value_heads": 2}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "apertus": ("apertus", {"rope_parameters": ROPE}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {}),
    "helium": ("helium", {}),
    "dots1": ("dots1", DEEPSEEK | {"n_group": 1, "topk_group": 1}),
    "minicpm3": ("minicpm3", LATENT_ATTENTION),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "granitemoeshared": ("granitemoeshared", GRANITE | EXPERTS | {"shared_intermediate_size": 32}),
    "hunyuan_moe": ("hunyuan_v1_moe", EXPERTS),
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "exaone": ("exaone", {}),
    "minimax_m2": ("minimax_m2", EXPERTS | {"rotary_dim": 8}),
    "internlm3": ("internlm3", {}),
    "jais2": ("jais2", {}),
    "exaone_moe": ("exaone_moe", EXPERTS | ALTERNATING | {"first_k_dense_replace": 1}),
    "solar_open": ("solar_open", DEEPSEEK | {"num_key_value_heads": 2}),
    "cwm": ("cwm", {}),
    "ministral": ("ministral", {"sliding_window": 256}),
    "ministral3": ("ministral3", {"rope_parameters": YARN | TRAINED_LENGTH | {"llama_4_scaling_beta": 0.1}}),
    "nemotron_h": (
        "nemotron_h",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}
_CONSTANTS = ("A_log", ".D", "dt_bias", "e_score_correction", "expert_bias", "alpha_", "beta", "eps")
_TEXT = ("The cat sat on the mat, and the cat's hat sat on the cat.", "In 1984 there were 12345 cats; they'd eaten 67.")


def config_of(name: str) -> Any:
    """Return the config of a model, with fields renamed as in its config class."""
    from transformers import CONFIG_MAPPING

    kind, changes = DECODERS[name]
    config_class: type[Any] = CONFIG_MAPPING[kind]
    aliases = config_class.attribute_map
    fields = set(config_class.__dataclass_fields__)
    values = {aliases.get(key, key): value for key, value in COMMON.items() if aliases.get(key, key) in fields}
    if "rope_parameters" in fields:
        values["rope_parameters"] = dict(ROPE)
    values |= {aliases.get(key, key): value for key, value in changes.items() if aliases.get(key, key) in fields}
    return config_class(**values)


def build(name: str, seed: int = 0) -> Any:
    """Return a model in which every weight affects the output: norms differ from 1 and biases from 0."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name)).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in _CONSTANTS) or not parameter.is_floating_point():
                continue
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise * (0.15 if "norm" in key.lower() or "ln_" in key else 0.1))
            else:
                parameter.copy_(noise if "embed" in key or "wte" in key else noise / max(parameter.shape[-1], 8) ** 0.5)
    model.tie_weights()
    return model


def save(name: str, folder: Path, seed: int = 0) -> Any:
    """Save a model with a byte-level tokenizer in ``folder``, and return the model."""
    model = build(name, seed)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return model


def some_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random token ids [batch, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
