from pathlib import Path

import pytest

from compress.inspection.layers import group_layers, model_prefix
from compress.models.stored_tensor import StoredTensor


def made(names: list[str], size: int = 4) -> list[StoredTensor]:
    location = {"origin": "", "file": "", "path": Path(), "start": 0, "stored_bytes": 0}
    return [StoredTensor(name=n, shape=(1,), dtype="float32", parameters=1, bytes=size, **location) for n in names]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.attention"),
        ("model.layers.3.post_attention_layernorm.weight", "layers.3.norms"),
        ("model.layers.3.mlp.down_proj.weight", "layers.3.feed-forward"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_llama_names(name: str, layer: str) -> None:
    around = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    assert name in [tensor.name for tensor in group_layers(made([*around, name]))[layer]]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.0.attn_q.weight", "blk.0.attention"),
        ("blk.0.attn_norm.weight", "blk.0.norms"),
        ("blk.0.ffn_up.weight", "blk.0.feed-forward"),
        ("token_embd.weight", "token_embd"),
        ("transformer.layer.1.sa_layer_norm.bias", "transformer.layer.1.norms"),
        ("transformer.layer.1.ffn.lin1.weight", "transformer.layer.1.feed-forward"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.attention"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.block.0.cross-attention"),
        ("decoder.layers.0.encoder_attn.k_proj.weight", "decoder.layers.0.cross-attention"),
        ("decoder.layers.0.fc1.weight", "decoder.layers.0.feed-forward"),
        ("h.0.ln_1.weight", "h.0.norms"),
        ("features.4.conv.weight", "features.4.conv"),
        ("constants.val_7", "constants"),
        ("W", "W"),
    ],
)
def test_names_of_other_families(name: str, layer: str) -> None:
    assert list(group_layers(made([name]))) == [layer]


def test_prefix_is_what_wraps_all_blocks() -> None:
    assert model_prefix(["bert.encoder.layer.0.w", "bert.embeddings.x.w", "classifier.weight"]) == "bert."
    assert model_prefix(["encoder.layer.0.w", "embeddings.x.w"]) == ""
    assert model_prefix(["encoder.layers.0.w", "encoder.conv.w", "decoder.layers.0.w", "decoder.x.w"]) == ""
    assert model_prefix(["blk.0.w.x", "blk.1.w.x"]) == ""
    assert model_prefix(["a.layers.0.w", "a.head.weight", "head.weight"]) == ""


def test_layers_get_coarser_until_they_are_few() -> None:
    parts = ("self_attn.q.weight", "mlp.up.weight", "input_layernorm.weight")

    def names(count: int) -> list[str]:
        blocks = [f"model.layers.{i}.{part}" for i in range(count) for part in parts]
        return ["model.embed.weight", *blocks, "lm_head.weight"]

    assert len(group_layers(made(names(10)))) == 32
    assert list(group_layers(made(names(30))))[:3] == ["embed", "layers.0", "layers.1"]
    assert set(group_layers(made(names(80)))) == {
        "embed",
        "layers.*.attention",
        "layers.*.feed-forward",
        "layers.*.norms",
        "lm_head",
    }


def test_the_rest_is_put_together_and_nothing_is_lost() -> None:
    tensors = made([f"module{i}.weight" for i in range(60)]) + made(["large.weight"], size=100)
    groups = group_layers(tensors, at_most=5)
    assert len(groups) == 5
    assert "large" in groups
    assert list(groups)[-1] == "other"
    assert sum(len(group) for group in groups.values()) == 61
