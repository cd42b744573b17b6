"""Encoders of text and of images with random weights: two layers, 32 wide, four heads of 8; pictures of 32 x 32.

`TEXTS` and `IMAGES` have a row for each: transformers' `model_type`, and the fields in which its config differs.
"""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
    "qkv_bias": True,
}
_STAGES = {"depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 2}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        *("bert", "roberta", "xlm-roberta", "electra", "camembert", "mpnet", "albert", "deberta", "deberta-v2"),
        *("modernbert", "nomic_bert", "eurobert", "roformer", "convbert", "mobilebert", "layoutlm", "ernie"),
        *("megatron-bert", "rembert", "xlm-roberta-xl", "roberta-prelayernorm", "nystromformer", "data2vec-text"),
        *("big_bird", "fnet", "funnel", "xlm", "flaubert", "ibert", "squeezebert"),
    )
} | {
    "distilbert": ("distilbert", {"hidden_dim": 48}),
    "squeezebert": ("squeezebert", {"embedding_size": 32}),
    "mobilebert": ("mobilebert", {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32}),
    "deberta-v2-relative": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "deit": ("deit", {}),
    "beit": ("beit", {}),
    "beit-relative": ("beit", {"use_relative_position_bias": True}),
    "data2vec-vision": ("data2vec-vision", {}),
    "dinov2": ("dinov2", {"mlp_ratio": 2}),
    "dinov2_with_registers": ("dinov2_with_registers", {"mlp_ratio": 2}),
    "ijepa": ("ijepa", {}),
    "vit_msn": ("vit_msn", {}),
    "siglip": ("siglip_vision_model", {}),
    "clip": ("clip_vision_model", {}),
    "yolos": ("yolos", {"image_size": [32, 32], "num_detection_tokens": 4}),
    "swin": ("swin", _STAGES),
    "swinv2": ("swinv2", _STAGES | {"image_size": 16}),
    "segformer": ("segformer", _PYRAMID),
    "pvt_v2": ("pvt_v2", _PYRAMID),
    "ast": ("audio-spectrogram-transformer", {"max_length": 32, "num_mel_bins": 32}),
}


def build(name: str, seed: int = 0) -> Any:
    """A model with weights that leave no term out."""
    from transformers import CONFIG_MAPPING, AutoModel

    kind, changes = (TEXTS | IMAGES)[name]
    made: type[Any] = CONFIG_MAPPING[kind]
    aliases, fields = made.attribute_map, set(made.__dataclass_fields__)
    given = COMMON | changes
    given = {aliases.get(key, key): value for key, value in given.items() if aliases.get(key, key) in fields}
    torch.manual_seed(seed)
    model = AutoModel.from_config(made(**given)).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise if "embed" in key.lower() else noise / parameter[0].numel() ** 0.5)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two texts of twelve tokens, or two pictures, for a model of `build`."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(3, config.vocab_size, (2, 12), generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins, generator=generator)}
    size = getattr(config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
