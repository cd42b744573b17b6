"""Create tiny text encoders and image models of many families with random weights.

They have two layers, a hidden size of 64 and images of 64 pixels. `TEXTS` and `IMAGES` map each name to the config
fields that differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np

VOCABULARY, POSITIONS, CLASSES, PIXELS = 300, 128, 5, 64
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_REAL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_PATCHES = {"image_size": PIXELS, "patch_size": 16}
_BEIT = {"use_relative_position_bias": True, "use_mean_pooling": True}
_STAGES = {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 2, 1, 1]}
_PYRAMID = {"num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 2, 1]}
_WINDOWS = {"patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 8}

TEXTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"_names": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}},
    "roberta": {},
    "electra": {"embedding_size": 64},
    "albert": {"embedding_size": 32},
    "camembert": {},
    "xlm-roberta": {},
    "ernie": {},
    "layoutlm": {},
    "data2vec-text": {},
    "roberta-prelayernorm": {},
    "megatron-bert": {},
    "mpnet": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {
        **{"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
        **{"norm_rel_ebd": "layer_norm", "position_biased_input": False},
    },
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "nomic_bert": {},
    "eurobert": {"num_key_value_heads": 2},
    "gte": {},
    "jina_embeddings_v3": {},
    "esm": {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "use_bidirectional_attention": True, "sliding_window": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "t5": {
        "d_kv": 16,
        "decoder_start_token_id": 0,
        "_names": {"hidden_size": "d_model", "num_hidden_layers": "num_layers"},
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},
    "convbert": {"embedding_size": 64},
    "roformer": {"embedding_size": 64},
    "squeezebert": {"embedding_size": 64, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "xlnet": {"d_head": 16, "_names": {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}},
    "mobilebert": {"intra_bottleneck_size": 32, "embedding_size": 32, "true_hidden_size": 32},
}
MORE_TEXTS: dict[str, dict[str, Any]] = {
    "funnel": {"_own_shape": True, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
    "bart": {
        **{"_own_shape": True},
        **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    },
    "xlm": {"_own_shape": True, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "fnet": {},
    "big_bird": {"attention_type": "original_full"},
    "flaubert": {"_own_shape": True, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "ibert": {},
    "nystromformer": {},
    "xlm-roberta-xl": {},
}
"""Unusual encoders: pooled queries, an encoder-decoder, old interfaces, no attention."""
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {**_TINY, **_PATCHES},
    "deit": {**_TINY, **_PATCHES},
    "beit": {**_TINY, **_PATCHES, **_BEIT},
    "data2vec-vision": {**_TINY, **_PATCHES, **_BEIT},
    "dinov2": {**_TINY, **_PATCHES},
    "dinov2_with_registers": {**_TINY, **_PATCHES},
    "vit_msn": {**_TINY, **_PATCHES},
    "ijepa": {**_TINY, **_PATCHES},
    "siglip": {"vision_config": {**_TINY, **_PATCHES}},
    "clip": {"vision_config": {**_TINY, **_PATCHES}},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "pvt": {"image_size": PIXELS, **_STAGES, **_PYRAMID, "sequence_reduction_ratios": [4, 2, 2, 1]},
    "segformer": {**_STAGES, **_PYRAMID},
    "levit": {"hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "resnet": {**_STAGES, "embedding_size": 32},
    "regnet": {**_STAGES, "embedding_size": 32, "groups_width": 16},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "focalnet": {"embed_dim": 32, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "poolformer": _STAGES,
}
_REAL_EXTRA = {"gemma3_text": {"head_dim": 32}, "qwen3": {"head_dim": 32}, "t5": {"d_kv": 32}}


def build(name: str, real: bool = False) -> Any:
    """Return a classifier with random weights, large enough that its outputs differ between inputs."""
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    text = name in TEXTS or name in MORE_TEXTS
    changes = dict((TEXTS | MORE_TEXTS | IMAGES)[name])
    renamed, custom = changes.pop("_names", {}), changes.pop("_own_shape", False)
    if text:
        shape = {} if custom else {renamed.get(key, key): value for key, value in (_REAL if real else _TINY).items()}
        shape |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": POSITIONS * (1 + 3 * real)}
        if name == "distilbert":
            shape["hidden_dim"] = shape.pop("intermediate_size")
        if name in ("t5", "xlnet", "funnel", "bart", "xlm", "flaubert"):
            shape.pop("max_position_embeddings")
        if name in ("t5", "xlnet"):
            inner = {"t5": ("d_ff", "num_heads"), "xlnet": ("d_inner", "n_head")}[name]
            for new, old in zip(inner, ("intermediate_size", "num_attention_heads"), strict=True):
                shape[new] = shape.pop(old)
        changes = shape | changes | (_REAL_EXTRA.get(name, {}) if real else {})
        if real and "embedding_size" in changes:
            changes["embedding_size"] = changes["hidden_size"]
    config = AutoConfig.for_model(name, **changes, num_labels=CLASSES)
    for token in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, 2)
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    chosen = kind._model_mapping[type(config)]
    module = (chosen[0] if isinstance(chosen, tuple) else chosen)(config).float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
        norms: list[Any] = [
            part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        ]
        for norm in norms:
            norm.weight.add_(1 - norm.weight.mean().round())  # those of EfficientNet are initialized with 0
            # Reduce LeViT's queries and keys, since saturated scores amplify rounding errors by thousands.
            norm.weight.mul_(0.5 if isinstance(norm, torch.nn.BatchNorm1d) else 1)
            norm.momentum = None
            norm.train()
        if norms:  # set the running statistics to those of activations, so that no signal vanishes
            count = 48 if name == "levit" else 16
            module(torch.from_numpy(np.stack([row["pixel_values"] for row in examples_of(name, count).inputs])))
        for norm in norms:  # channels that hardly vary would amplify rounding errors
            norm.running_var.clamp_(min=0.05 * norm.running_var.mean())
        module.eval()
    return module


def examples_of(name: str, count: int = 48, longest: int = 40, seed: int = 0) -> Any:
    """Return random texts of different lengths, or images of one size."""
    from compress.tasks.task import Examples

    generator = np.random.default_rng(seed)
    if name in IMAGES:
        size = 224 if name == "levit" else PIXELS
        images = generator.normal(0, 1, (count, 3, size, size)).astype(np.float32)
        images += generator.normal(0, 1, (count, 3, 1, 1)).astype(np.float32)
        return Examples([{"pixel_values": image} for image in images], {"pixel_values": None})
    rows = []
    for length in generator.integers(4, longest + 1, count):
        ids = generator.integers(5, VOCABULARY, length)
        ids[-1] = 2
        rows.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return Examples(rows, {"input_ids": 0.0, "attention_mask": 0.0})


def inputs(name: str) -> dict[str, Any]:
    """Return a padded batch of two examples as tensors."""
    from compress.tasks.inference import tensors

    examples = examples_of(name)
    return {key: value for key, value in tensors(examples, [0, 1]).items() if key in examples.padding}
