"""Layers that aren't plain linear ones: GPT-2's transposed, a head by another name, matrices of low rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_decoders
import torch
from decoders import context, layers_of
from transformers import AutoModelForCausalLM

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.stages.gptq.stage import Gptq


def quantized(name: str, folder: Path, group_size: int = 32) -> QuantizedCheckpoint:
    tiny_decoders.save(name, folder / "model")
    stage = Gptq(bits=4, group_size=group_size, samples=8, sequence_length=16, embedding_bits=16)
    return stage.run(Checkpoint(folder / "model"), context(folder / "scratch"))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_integers_stand_for_weights_that_transformers_computes_with(name: str, tmp_path: Path) -> None:
    checkpoint = quantized(name, tmp_path)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model").float().eval()
    layers = {layer: about for layer, about in layers_of(checkpoint.folder).items() if about.get("bits")}
    assert len(layers) == 8 and all(about["error"] < 0.1 for about in layers.values())
    with torch.no_grad():
        for layer in layers:
            part = module.get_submodule(layer)
            weight = checkpoint.weight(layer)
            expected_weight = weight.T if name == "gpt2" else weight
            assert 0 < (part.weight - expected_weight).norm() < 0.3 * expected_weight.norm()
            part.weight.copy_(expected_weight)
        for path, parameter in module.named_parameters():
            if path.removesuffix(".weight") not in layers:
                parameter.copy_(parameter.half().float())
        ids = tiny_decoders.some_ids(2, 12)
        torch.testing.assert_close(
            load_quantized_module(checkpoint)(ids).logits, module(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_matrices_of_low_rank_that_do_not_fit_are_left_alone_with_the_reason(tmp_path: Path) -> None:
    stored_layers = layers_of(quantized("deepseek_v3", tmp_path).folder)
    narrow = {
        name.rpartition(".")[2] for name, about in stored_layers.items() if about.get("why", "").startswith("narrow")
    }
    assert narrow == {"q_a_proj", "q_b_proj", "kv_b_proj"}
    assert all(stored_layers[name]["bits"] == 4 for name in stored_layers if name.endswith((".o_proj", ".up_proj")))
