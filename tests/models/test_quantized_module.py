"""Tests of modules with integer weights, against transformers' own model with dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized import quantize_tiny_llama, save_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module, make_vectors_trainable, named_scaled_integers
from compress.utils.errors import ModelError

IDS = torch.arange(48).view(2, 24) * 3 % 150


def quantized(tmp_path: Path, table_bits: int | None = 4, **changes: object) -> QuantizedCheckpoint:
    return quantize_tiny_llama(save_tiny_llama(tmp_path / "source", **changes), tmp_path / "q", table_bits=table_bits)


def plain(checkpoint: Checkpoint, source: Path, cls: type = LlamaForCausalLM) -> torch.nn.Module:
    """Return the float model of ``source`` with every weight replaced by the checkpoint's."""
    module = cls.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            layer, _, leaf = name.rpartition(".")
            parameter.copy_(checkpoint.weight(layer) if leaf == "weight" else checkpoint.stored(name))
    return module


@torch.no_grad()
def logits(module: torch.nn.Module) -> torch.Tensor:
    actual: torch.Tensor = module(input_ids=IDS).logits
    return actual


@pytest.mark.parametrize("table_bits", [4, 8, None])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_the_dequantized_model(tmp_path: Path, table_bits: int | None, tied: bool) -> None:
    checkpoint = quantized(tmp_path, table_bits, tie_word_embeddings=tied)
    expected = logits(plain(checkpoint, tmp_path / "source"))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits(load_quantized_module(checkpoint)), expected, rtol=1e-5, atol=1e-5)


def test_biases_of_quantized_layers_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = Qwen2ForCausalLM(Qwen2Config(vocab_size=160, num_key_value_heads=2, tie_word_embeddings=True, **fields))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    module.float().save_pretrained(tmp_path / "source")
    checkpoint = quantize_tiny_llama(Checkpoint(tmp_path / "source"), tmp_path / "q")
    expected = logits(plain(checkpoint, tmp_path / "source", Qwen2ForCausalLM))
    loaded = load_quantized_module(checkpoint)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert float(loaded.get_submodule("model.layers.0.self_attn.q_proj").bias.abs().max()) > 0.1


def test_integers_take_one_byte_and_are_not_in_the_state_dict(tmp_path: Path) -> None:
    loaded = load_quantized_module(quantized(tmp_path))
    actual = dict(named_scaled_integers(loaded))
    assert len(actual) == 2 * 7 + 1, "seven linear layers a block, and the table once"
    assert {grid.integers.dtype for grid in actual.values()} == {torch.int8}
    assert not any("integers" in name for name in loaded.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_bfloat16_autocast_logits_are_close(tmp_path: Path) -> None:
    loaded = load_quantized_module(quantized(tmp_path))
    exact = logits(loaded)
    with torch.autocast("cpu", torch.bfloat16):
        near = logits(loaded).float()
    assert 0 < float((near - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_trainable_norms_are_rounded_to_float16(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    loaded = load_quantized_module(checkpoint)
    original = logits(loaded)
    names = make_vectors_trainable(loaded, checkpoint)
    assert sorted(names) == sorted(name for name in checkpoint.files if name.endswith("norm.weight"))
    assert torch.equal(logits(loaded), original)
    norm = loaded.get_submodule("model.norm")
    with torch.no_grad():
        norm.parametrizations.weight.original.fill_(1 / 3)
    assert torch.equal(norm.weight, torch.full((64,), 4 / 3).half().float())


def test_trainable_scales_are_logarithmic_and_rounded_to_float16(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    layer = load_quantized_module(checkpoint).get_submodule(name)
    with torch.no_grad():
        layer.grid.log_ratio.fill_(0.1)
    stored = checkpoint.quantized(name)
    expected = (stored.scales * torch.tensor(0.1).exp()).half().float()
    assert torch.equal(layer.grid.scales(), expected)
    assert torch.equal(layer.weight, (stored.integers.float() - 8) * expected.repeat_interleave(32, 1))


@pytest.mark.parametrize(
    ("old", "new", "shape", "message"),
    [
        ("model.norm.weight", None, (), r"no tensor 'model\.norm\.weight'"),
        ("model.norm.weight", "model.norm.weight", (8, 8), r"'model\.norm\.weight' is \[8, 8\]"),
        ("model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.third_proj.qweight", (), r"mlp\.third_proj'"),
    ],
)
def test_missing_reshaped_and_unknown_tensors_are_named(
    tmp_path: Path, old: str, new: str | None, shape: tuple[int, ...], message: str
) -> None:
    checkpoint = quantized(tmp_path)
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(old)
    if new:
        tensors[new] = tensor.reshape(shape) if shape else tensor
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_quantized_module(checkpoint)


def test_architecture_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    (checkpoint.folder / "config.json").write_text(json.dumps({**checkpoint.config, "model_type": "vit"}))
    with pytest.raises(ModelError, match="cannot build a causal language model"):
        load_quantized_module(QuantizedCheckpoint(checkpoint.folder))
