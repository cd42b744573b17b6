"""A real architecture, exported with its cache: what is generated equals what transformers generates."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.runtimes.onnxruntime import RUNTIME
from compress.formats.targets import TARGETS

LAYERS = 2


class FlatLlama(torch.nn.Module):
    """Keys and values go in and come out as plain tensors."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return out.logits, *present


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Two layers of four heads that share two keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def export(model: LlamaForCausalLM, path: Path) -> None:
    """As `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.*` -> `logits`, `present.N.*`."""
    kinds = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    length, past = torch.export.Dim("length", min=1, max=64), torch.export.Dim("past", min=1, max=64)
    automatic = torch.export.Dim.AUTO
    inputs = (
        torch.ones((1, 3), dtype=torch.long),
        torch.ones((1, 8), dtype=torch.long),
        torch.arange(5, 8)[None],
        [torch.zeros((1, 2, 5, 8)) for _ in kinds],
    )
    shapes = ({1: length}, {1: automatic}, {1: length}, [{2: past} for _ in kinds])
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            FlatLlama(model),
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)],
            output_names=["logits", *(f"present.{kind}" for kind in kinds)],
        )
    assert program is not None
    onnx.save(program.model_proto, path)


@pytest.mark.slow
def test_prompt_and_steps_are_what_transformers_generates(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    export(llama, tmp_path / "model.onnx")
    decoder = Decoder(RUNTIME.open(tmp_path, TARGETS["cpu"], threads=1), "llama")
    assert decoder.cached
    for prompt in ([5], [17, 2, 33, 33, 8, 51]):
        found = [decoder.prefill(prompt)]
        while len(found) < 24:
            found.append(decoder.step(found[-1]))
        ids = torch.tensor([prompt])
        whole = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        expected = whole[0, len(prompt) :].tolist()
        assert len(set(expected)) > 3, "a model that repeats itself proves little"
        assert found == expected
