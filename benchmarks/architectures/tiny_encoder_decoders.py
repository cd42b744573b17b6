"""Create tiny encoder-decoders of many families with random weights.

Encoder and decoder have two layers, a hidden size of 64 and four heads of 16. `PAIRS` maps each name to transformers'
`model_type` and the config fields that differ from `COMMON`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_decoders import EXPERTS

VOCABULARY, LENGTH, FRAMES, FEATURES = 352, 14, 64, 16
START = 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "hidden_size": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_hidden_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "intermediate_size": 128,
    "d_ff": 128,
    "d_kv": 16,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "max_position_embeddings": 64,
    "scale_embedding": True,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
SPEECH: dict[str, Any] = {"max_source_positions": FRAMES // 2, "max_target_positions": 64}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5-v1.1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", {}),
    "umt5": ("umt5", {}),
    "longt5": ("longt5", {"local_radius": 4}),
    "switch_transformers": ("switch_transformers", EXPERTS),
    "bart": ("bart", {}),
    "mbart": ("mbart", {}),
    "plbart": ("plbart", {}),
    "mvp": ("mvp", {}),
    "marian": ("marian", {}),
    "pegasus": ("pegasus", {}),
    "pegasus_x": ("pegasus_x", {"block_size": 8}),
    "bigbird_pegasus": ("bigbird_pegasus", {"attention_type": "original_full"}),
    "blenderbot": ("blenderbot", {}),
    "blenderbot-small": ("blenderbot-small", {}),
    "m2m_100": ("m2m_100", {}),
    "nllb-moe": ("nllb-moe", {"num_experts": 4, "expert_capacity": 64}),
    "led": ("led", {"attention_window": 8, "max_encoder_position_embeddings": 64}),
    "prophetnet": ("prophetnet", {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}),
    "fsmt": ("fsmt", {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}),
    "bert2bert": ("encoder-decoder", {}),
    "t5gemma": ("t5gemma", {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "whisper": ("whisper", SPEECH | {"num_mel_bins": FEATURES}),
    "speech_to_text": (
        "speech_to_text",
        SPEECH | {"input_feat_per_channel": FEATURES, "conv_channels": 32},
    ),
    "moonshine": ("moonshine", {}),
}


def config_of(name: str) -> Any:
    """Return the config of a model, with fields renamed as in its config class."""
    from transformers import CONFIG_MAPPING, BertConfig, EncoderDecoderConfig, T5GemmaModuleConfig

    kind, changes = PAIRS[name]
    config_class: type[Any] = CONFIG_MAPPING[kind]
    if kind == "encoder-decoder":
        halves = [_create_config(BertConfig, {}) for _ in range(2)]
        tokens = {key: COMMON[key] for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id")}
        return EncoderDecoderConfig.from_encoder_decoder_configs(*halves, **tokens)
    if kind == "t5gemma":
        halves = [_create_config(T5GemmaModuleConfig, changes) for _ in range(2)]
        return config_class(encoder=halves[0], decoder=halves[1], vocab_size=VOCABULARY)
    return _create_config(config_class, changes)


def _create_config(config_class: type[Any], changes: Mapping[str, Any]) -> Any:
    fields, aliases = set(config_class.__dataclass_fields__), config_class.attribute_map
    values = {aliases.get(key, key): value for key, value in (COMMON | changes).items() if key not in fields}
    values |= {key: value for key, value in (COMMON | changes).items() if key in fields}
    return config_class(**{key: value for key, value in values.items() if key in fields})


def build(name: str) -> Any:
    """Return a model whose norms differ from 1 and biases from 0, and whose logits vary."""
    from compress.models.meta_model import auto_class

    torch.manual_seed(0)
    config = config_of(name)
    model = auto_class(config).from_config(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.1)
            elif "embed_positions" not in key:
                parameter.copy_(noise * (0.5 if "emb" in key or "shared" in key else parameter[0].numel() ** -0.5))
        for key, buffer in model.named_buffers():
            if key.endswith("final_logits_bias"):
                buffer.normal_()
    model.tie_weights()
    return model


def save(name: str, folder: Path) -> Any:
    """Save a model in ``folder``, and return the model."""
    model = build(name)
    model.save_pretrained(folder)
    return model


def examples(name: str, count: int = 2, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return encoder inputs (texts, one of them padded, or speech) and the start tokens [count, 1] of the decoder."""
    generator, start = np.random.default_rng(seed), np.full((count, 1), START)
    shape = {"whisper": (FEATURES, FRAMES), "speech_to_text": (FRAMES, FEATURES), "moonshine": (4000,)}.get(name)
    if shape is not None:
        sound = generator.normal(size=(count, *shape)).astype(np.float32)
        return {"input_values" if len(shape) == 1 else "input_features": sound}, start
    ids = generator.integers(4, VOCABULARY - 4, (count, LENGTH))
    mask = np.ones_like(ids)
    ids[1, LENGTH // 2 :], mask[1, LENGTH // 2 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, start


def decoder_ids(count: int, length: int, seed: int = 1) -> np.ndarray:
    """Return random decoder inputs [count, length] that begin with the start token."""
    ids = np.random.default_rng(seed).integers(4, VOCABULARY - 4, (count, length))
    ids[:, 0] = START
    return ids


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return a batch of `examples` with decoder inputs."""
    encoder_inputs, start = examples(name)
    arrays = encoder_inputs | {"decoder_input_ids": decoder_ids(len(start), 6)}
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
