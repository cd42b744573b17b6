"""Tests of LoRA adapters written by peft: merged weights against the formula, and mismatched adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from peft import PromptTuningConfig, get_peft_model
from quantized import save_tiny_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from compress.models.lora_adapter import check_adapter, check_fits, merge
from compress.utils.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft calls what transformers will remove."""
TARGETS = ("q_proj", "down_proj")


def llama(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base").folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Save a peft adapter of rank 4 whose product is not zero."""
    return save_adapter(llama(base), tmp_path / "adapter", *TARGETS)


def test_merging_adds_alpha_over_rank_times_the_product(base: Path, adapter: Path) -> None:
    factors = load_file(adapter / "adapter_model.safetensors")
    original = dict(llama(base).named_parameters())
    merged = merge(llama(base), adapter)
    assert type(merged) is LlamaForCausalLM
    for name, weight in merged.named_parameters():
        change = weight.detach() - original[name].detach()
        layer = name.removesuffix(".weight")
        if layer.endswith(TARGETS):
            a, b = (factors[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(change, 1.5 * b @ a, rtol=1e-4, atol=1e-5)
            assert float(change.abs().max()) > 0.01
        else:
            assert float(change.abs().max()) == 0


def test_an_adapter_of_a_wider_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", hidden_size=128).folder
    with pytest.raises(ModelError, match=r"lora_[AB]\.weight' is \[") as caught:
        merge(llama(other), adapter)
    assert "128 in place of 64" in str(caught.value)


def test_an_adapter_of_a_deeper_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", num_hidden_layers=1).folder
    with pytest.raises(ModelError, match=r"for a layer 'model\.layers\.1\..*which the model does not have"):
        check_fits(adapter, llama(other))


def test_adapter_with_a_missing_tensor_is_refused(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    factors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(factors, path)
    with pytest.raises(ModelError, match="peft cannot put the adapter on the model"):
        merge(llama(base), adapter)


def test_adapter_with_an_unknown_tensor_is_refused(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.norm.third": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"no layers for 1 of the adapter's tensors, such as .*norm\.third"):
        merge(llama(base), adapter)


def test_weights_that_are_not_finite_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    factors[min(factors)][0, 0] = float("nan")
    save_file(factors, path)
    with pytest.raises(ModelError, match="NaN or infinite"):
        check_adapter(adapter)


def test_pickled_weights_are_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle"):
        check_adapter(adapter)


def test_other_kinds_of_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(llama(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="'PROMPT_TUNING'"):
        check_adapter(tmp_path / "prompt")


def test_missing_adapter_config_or_weights_is_reported(base: Path, adapter: Path) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        check_adapter(base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        check_adapter(adapter)


def test_an_adapter_of_a_tied_head_is_not_merged(base: Path, tmp_path: Path) -> None:
    untied = llama(save_tiny_llama(tmp_path / "untied", tie_word_embeddings=False).folder)
    save_adapter(untied, tmp_path / "head", "lm_head")
    with pytest.raises(ModelError, match="whose weight is the embedding's too"):
        merge(llama(base), tmp_path / "head")
