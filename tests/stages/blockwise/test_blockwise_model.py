"""Running a decoder block by block gives transformers' own logits, whatever the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from decoders import ARCHITECTURES, SMALL, module_of, save_decoder, some_ids
from quantized import quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file

from compress.models.checkpoint import Checkpoint
from compress.stages.blockwise.blockwise_model import build_blockwise_model, logits
from compress.utils.errors import ModelError, StageError


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_logits_are_those_of_transformers(config: str, tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, config)
    ids = some_ids(3, 20)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=ids).logits
    found = logits(checkpoint, ids)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert float(expected.std()) > 0.1


def test_bfloat16_weights_count_as_float32(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, "Gemma3TextConfig", dtype=torch.bfloat16)
    assert checkpoint.stored("model.norm.weight").dtype == torch.bfloat16
    ids = some_ids(2, 12)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=ids).logits
    torch.testing.assert_close(logits(checkpoint, ids), expected, atol=2e-4, rtol=1e-4)


def test_integers_count_as_the_weights_they_stand_for(tmp_path: Path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "source"), dtype=torch.float32
    ).eval()
    state = {}
    for name in model.state_dict():
        module = name.removesuffix(".weight")
        if module == "lm_head":
            module = "model.embed_tokens"
        table = module == "model.embed_tokens"
        state[name] = quantized.stored(f"{module}.weight").float() if table else quantized.weight(module)
    model.load_state_dict(state)
    ids = some_ids(2, 24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits(quantized, ids), expected, atol=1e-4, rtol=1e-4)


def test_only_one_block_has_weights(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    decoder.load(1)
    assert all(parameter.device.type == "cpu" for parameter in decoder.blocks[1].parameters())
    assert all(parameter.is_meta for parameter in decoder.blocks[0].parameters())
    decoder.unload(1)
    held = [name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta]
    assert held == ["model.norm.weight"]


def test_rotary_positions_are_there_although_no_file_has_them(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    call = decoder.calls(some_ids(1, 8))[0]
    cosines, _ = call.named["position_embeddings"]
    assert float(cosines[0, 3, 0]) == pytest.approx(float(torch.cos(torch.tensor(3.0))))


def test_an_architecture_without_blocks_of_linear_layers(tmp_path: Path) -> None:
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(vocab_size=160, emb_dim=32, n_layers=2, n_heads=2))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StageError, match="XLMWithLMHeadModel cannot be quantized block by block") as caught:
        build_blockwise_model(Checkpoint(tmp_path))
    assert "torch.nn.Linear" in str(caught.value.expected)


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | {"model_type": "squid"}))
    with pytest.raises(ModelError, match="squid"):
        build_blockwise_model(Checkpoint(tmp_path))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=160, d_model=32, num_layers=1, d_ff=32, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal language model"):
        build_blockwise_model(Checkpoint(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path).folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    decoder = build_blockwise_model(Checkpoint(tmp_path))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        decoder.load(1)


def test_shapes_at_odds_with_the_config(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"is \[96, 64\]; the config makes it \[64, 64\]"):
        build_blockwise_model(Checkpoint(tmp_path)).load(0)


def test_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token id 160 is outside the model's vocabulary of 160"):
        logits(save_decoder(tmp_path), torch.tensor([[3, 160]]))


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path).folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight'"):
        build_blockwise_model(Checkpoint(tmp_path))


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"no 'lm_head\.weight'"):
        build_blockwise_model(Checkpoint(tmp_path))


def test_blocks_that_are_given_something_of_the_tokens(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    body = decoder.model.base_model
    rotary = body.rotary_emb.forward

    def of_tokens(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = rotary(hidden, position_ids)
        return cosines + hidden.mean(), sines

    body.rotary_emb.forward = of_tokens
    with pytest.raises(StageError, match="what block 0 is given depends on the tokens"):
        decoder.calls(some_ids(1, 8))


def test_config_fields_of_the_builder_are_used() -> None:
    # A misspelt field would make a default model of hundreds of megabytes.
    made = transformers.LlamaConfig(**SMALL)
    assert {name: getattr(made, name) for name in SMALL} == SMALL
