"""How much tokens count, against a backward pass through the whole model as transformers runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import context, inputs_of_layers, module_of, save_decoder, some_ids

from compress.models.checkpoint import Checkpoint
from compress.numerics.gptq import output_error
from compress.stages.blockwise.blockwise_model import build_blockwise_model
from compress.stages.blockwise.calibration import Importance, calibration_sequences
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.stages.gptq.token_weighting import Gradients
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

SEED = 5


def measured(checkpoint: Checkpoint, ids: torch.Tensor, folder: Path, **config: object) -> Importance:
    settings = Quantization(precision="fp32", **config)
    return Gradients(build_blockwise_model(checkpoint), settings, ids, folder, SilentProgress(), SEED).importance()


def by_autograd(checkpoint: Checkpoint, ids: torch.Tensor) -> Importance:
    """The same in one pass over all windows, with the same answers drawn."""
    module = module_of(checkpoint)
    outputs: dict[str, torch.Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":

            def keep(_: object, __: object, output: torch.Tensor, name: str = name) -> None:
                output.retain_grad()
                outputs[name] = output

            part.register_forward_hook(keep)
    rows = module.get_input_embeddings().weight.detach()[ids].requires_grad_()
    module.get_input_embeddings().register_forward_hook(
        # What the architecture does to a row of its table, linearly.
        lambda _, __, output: rows * (output / rows.detach())
    )
    logits = module(input_ids=ids, use_cache=False).logits
    shares = torch.softmax(logits.detach(), -1)
    generator = torch.Generator().manual_seed(SEED)
    answers = torch.cat([torch.multinomial(window, 1, generator=generator) for window in shares])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers[:, 0], reduction="sum")
    loss.backward()
    layers = {}
    for name, output in outputs.items():
        assert output.grad is not None
        squares = output.grad.square().mean(-1).flatten()
        layers[name] = squares / squares.mean()
    assert rows.grad is not None
    flat = rows.grad.flatten(0, 1)
    return Importance(layers, (1 - shares.square().sum(-1)).flatten(), flat.T @ flat / len(flat))


@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen3Config", "Gemma2Config", "PhiConfig", "GraniteConfig"])
def test_block_by_block_is_as_all_at_once(config: str, tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path / "model", config), some_ids(3, 16)
    token_weights, expected = measured(checkpoint, ids, tmp_path / "work"), by_autograd(checkpoint, ids)
    assert token_weights.layers.keys() == expected.layers.keys()
    for name, weights in expected.layers.items():
        torch.testing.assert_close(token_weights.layers[name], weights, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(token_weights.head, expected.head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        token_weights.embedding, expected.embedding, rtol=2e-3, atol=1e-3 * float(expected.embedding.max())
    )
    assert not (tmp_path / "work").exists()


def test_experts_have_no_weights_and_the_rest_of_their_block_has(tmp_path: Path) -> None:
    token_weights = measured(save_decoder(tmp_path / "model", "Qwen2MoeConfig"), some_ids(2, 16), tmp_path / "work")
    assert not any(".experts." in name for name in token_weights.layers)
    assert "model.layers.0.mlp.shared_expert.down_proj" in token_weights.layers
    assert all(float(weights.mean()) == pytest.approx(1) for weights in token_weights.layers.values())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    token_weights = measured(save_decoder(tmp_path / "model"), some_ids(2, 16), tmp_path / "work")
    token_weights.write(tmp_path / "kept.safetensors")
    again = Importance.read(tmp_path / "kept.safetensors")
    assert again.layers.keys() == token_weights.layers.keys()
    assert all(torch.equal(again.layers[name], weights) for name, weights in token_weights.layers.items())
    assert torch.equal(again.head, token_weights.head) and torch.equal(again.embedding, token_weights.embedding)


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path / "model")
    decoder = build_blockwise_model(checkpoint)
    fill = decoder.tensor

    def broken(module: str, leaf: str, shape: torch.Size) -> torch.Tensor:
        filled = fill(module, leaf, shape)
        return filled.fill_(float("nan")) if module == "model.norm" else filled

    decoder.tensor = broken  # type: ignore[method-assign]
    decoder.fill_surroundings()
    work = Gradients(decoder, Quantization(precision="fp32"), some_ids(2, 16), tmp_path / "work", SilentProgress())
    with pytest.raises(StageError, match="the answer is not finite"):
        work.importance()


@pytest.mark.parametrize("batches", [1, 3])
def test_layers_are_solved_for_the_tokens_that_matter(
    batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers see the same inputs, the weighted error falls and the plain one rises."""
    checkpoint = save_decoder(tmp_path / "model", num_hidden_layers=1)
    if batches > 1:
        monkeypatch.setattr(
            "compress.stages.blockwise.calibration.batch_size", lambda block, ids: -(-len(ids) // batches)
        )
    name, errors = "model.layers.0.self_attn.q_proj", {}
    for guided in (True, False):
        stage_context = context(tmp_path / f"guided-{guided}")
        stage = Gptq(bits=3, group_size=32, samples=12, sequence_length=16, precision="fp32", guided=guided)
        done = stage.run(checkpoint, stage_context)
        quantized = done.quantized(name)
        assert quantized is not None
        errors[guided] = quantized.dequantize()
    counts = Importance.read(tmp_path / "guided-True" / "importance.safetensors").layers[name]
    inputs = inputs_of_layers(module_of(checkpoint), calibration_sequences(stage_context, checkpoint, 12, 16))[name]
    weight = checkpoint.stored(f"{name}.weight").float()
    for weights, better in ((counts, True), (torch.ones_like(counts), False)):
        hessian = (inputs * weights[:, None]).T @ inputs
        output_errors = {guided: output_error(weight, errors[guided], hessian) for guided in errors}
        assert output_errors[better] < output_errors[not better]
