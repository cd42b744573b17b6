"""Tests of mixed bits: sensitivities against runs with one coarse layer, allocation by brute force, and whole runs."""

from __future__ import annotations

import itertools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Notes, context, inputs_of_layers, layers_of, module_of, save_decoder, some_ids
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.numerics.gptq import GptqSettings, output_error, round_to_nearest
from compress.pipeline.recipe_sources import read_shape
from compress.stages.blockwise.block_pass import BlockPass
from compress.stages.blockwise.blockwise_model import build_blockwise_model, fill_surroundings
from compress.stages.blockwise.calibration import Importance, calibration_sequences
from compress.stages.blockwise.cost import (
    checkpoint_bytes,
    quantization_flops,
    quantization_memory_bytes,
)
from compress.stages.blockwise.layers import Layer, linears, plan_layers
from compress.stages.cost_model import Shape
from compress.stages.gptq.bit_allocation import TABLES, Sensitivity, Survey, allocate, average_bits, stored_bits
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.stages.gptq.token_weighting import Gradients
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress
from compress.utils.storage import size_bytes

CONFIG = Quantization(group_size=32, precision="fp32")
LENGTH = 40


def log_probabilities(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities at the 32 positions that the survey evaluates."""
    with torch.no_grad():
        logits = module(input_ids=ids).logits
    places = torch.linspace(0, LENGTH - 1, 32).round().long()
    return logits[0, places].double().log_softmax(-1)


def divergence(original: torch.Tensor, other: torch.Tensor) -> float:
    return float((original.exp() * (original - other)).sum() / len(original))


def test_sensitivities_are_divergences_with_one_coarse_layer(tmp_path: Path) -> None:
    source, ids = save_decoder(tmp_path), some_ids(2, LENGTH)
    decoder = build_blockwise_model(source)
    coarse = source.weight("model.embed_tokens").mul(8).round().div(8)
    survey = Survey(decoder, CONFIG, plan_layers(decoder, CONFIG), (2, 3, 8), SilentProgress(), tmp_path)
    hessians: list[torch.Tensor] = []

    def heads(hessian: torch.Tensor) -> dict[int, torch.Tensor]:
        hessians.append(hessian)
        return {4: coarse}

    losses = survey.run(ids, {4: coarse}, heads)
    module, inputs = module_of(source), {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0][0]}))
    original = log_probabilities(module, ids[:1])
    inputs_before = dict(inputs)
    with torch.no_grad():
        module(input_ids=ids[1:])
    seen = torch.cat([inputs_before["lm_head"], inputs["lm_head"]])
    hessian = seen.T @ seen / len(seen)
    # A tied table is read row by row as well.
    hessian += 0.2 * hessian.diagonal().mean() * torch.eye(len(hessian))
    torch.testing.assert_close(hessians[0], hessian, atol=1e-4, rtol=1e-3)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear) and name != "lm_head":
            weight, importance = part.weight.data, inputs_before[name].square().mean(0)
            rounded = round_to_nearest(weight, GptqSettings(3, 32), importance).dequantize()
            part.weight.data = rounded
            expected = divergence(original, log_probabilities(module, ids[:1]))
            part.weight.data = weight
            assert losses[name][3] == pytest.approx(expected, rel=0.1, abs=1e-6)
            assert losses[name][2] > losses[name][3] > 50 * losses[name][8] > 0
    module.model.embed_tokens.weight.data.copy_(coarse)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    expected = divergence(original, log_probabilities(module, ids[:1]))
    assert losses[TABLES] == {4: pytest.approx(expected, rel=0.02), 16: 0.0}


def test_layer_size_counts_integers_scales_and_zero_points() -> None:
    layer = Layer("layer", 64, 96, 4, 32)
    assert stored_bits(layer, 4, symmetric=True) == 64 * 96 * 4 + 64 * 3 * 16
    assert stored_bits(layer, 3, symmetric=False) == 64 * 96 * 3 + 64 * 3 * (16 + 3)
    assert stored_bits(layer, None, symmetric=True) == 64 * 96 * 16
    assert average_bits([[layer]], [], 64 * 96 + 100, True) == (64 * 96 * 4 + 64 * 3 * 16 + 1600) / (64 * 96 + 100)


def problem() -> tuple[list[list[Layer]], list[Layer], Sensitivity]:
    layers = [[Layer("one", 32, 32, 4, 32), Layer("two", 64, 32, 4, 32)], [Layer("three", 32, 64, 4, 32)]]
    losses = {
        "one": {2: 0.9, 4: 0.2, 8: 0.01},
        "two": {2: 0.5, 4: 0.3, 8: 0.02},
        "three": {2: 4.0, 4: 1.0, 8: 0.1},
        TABLES: {4: 0.7, 8: 0.1, 16: 0.0},
    }
    return layers, [Layer("table", 96, 32, 4, 32)], losses


@pytest.mark.parametrize("target", [3.4, 4.0, 5.5, 7.0, 12.0])
def test_allocation_is_optimal_within_the_budget(target: float) -> None:
    layers, tables, sensitivity = problem()
    flat = [layer for block in layers for layer in block]
    parameters = sum(layer.rows * layer.columns for layer in (*flat, *tables)) + 50
    chosen = allocate(Quantization(target_bits=target), layers, tables, parameters, sensitivity, (4, 8, 16))
    best = (float("inf"), ())
    for *bits, table in itertools.product((2, 4, 8), (2, 4, 8), (2, 4, 8), (4, 8, 16)):
        size = sum(stored_bits(layer, some, True) for layer, some in zip(flat, bits, strict=True)) + 50 * 16
        size += stored_bits(tables[0], table, True)
        loss = sum(sensitivity[layer.name][some] for layer, some in zip(flat, bits, strict=True))
        loss += sensitivity[TABLES][table]
        if size <= target * parameters:
            best = min(best, (loss, (*bits, table)))
    assert (*(chosen.bits[layer.name] for layer in flat), chosen.tables) == best[1]
    assert chosen.divergence == pytest.approx(best[0])
    assert 0 < chosen.average <= target


def test_budget_can_be_given_in_bytes() -> None:
    layers, tables, sensitivity = problem()
    parameters = 32 * 32 + 64 * 32 + 32 * 64 + 96 * 32
    average = allocate(Quantization(target_bits=5.5), layers, tables, parameters, sensitivity, (4, 8, 16))
    limit = int(5.5 * parameters / 8)
    assert allocate(Quantization(max_bytes=limit), layers, tables, parameters, sensitivity, (4, 8, 16)) == average


def test_infeasible_budget_reports_the_possible_range() -> None:
    layers, tables, sensitivity = problem()
    parameters = 32 * 32 + 64 * 32 + 32 * 64 + 96 * 32
    least = (5120 * 2 + 160 * 16 + 96 * 32 * 4 + 96 * 16) / parameters
    with pytest.raises(StageError, match=rf"target_bits: 3: the least possible is {least:.2f} bits on average"):
        allocate(Quantization(target_bits=3), layers, tables, parameters, sensitivity, (4, 8, 16))


def mixed(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> QuantizedCheckpoint:
    stage = Gptq(group_size=32, samples=6, sequence_length=LENGTH, precision="fp32", **fields)
    return stage.run(source, context(scratch, progress=notes))


def test_insensitive_layers_get_few_bits(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path / "source").folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e-3
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    notes = Notes()
    result = mixed(Checkpoint(tmp_path / "source"), tmp_path / "scratch", notes, target_bits=4.8)
    layers = layers_of(result.folder)
    assert layers["model.layers.1.self_attn.o_proj"]["bits"] == 2
    average = json.loads((result.folder / "quantized_layers.json").read_text())["bits_per_parameter"]
    assert 4.4 < average <= 4.8
    assert any(f"{average:.2f} bits on average" in line and "layers at 2" in line for line in notes.said)


def test_bits_of_each_layer_are_stored_as_gptqmodel_reads_them(tmp_path: Path) -> None:
    result = mixed(save_decoder(tmp_path / "source"), tmp_path / "scratch", target_bits=4.8, embedding_bits=4)
    assert result.quantization is not None
    rules = result.quantization["dynamic"]
    for name, layer in layers_of(result.folder).items():
        if name == "model.embed_tokens":
            continue
        matching = [rule for rule in rules if re.match(rule.removeprefix("+:"), name)]
        assert [rules[rule]["bits"] for rule in matching] == ([layer["bits"]] if layer["bits"] != 4 else [])
        stored_layer = result.quantized(name)
        assert stored_layer is not None and stored_layer.bits == layer["bits"]
    assert len({layer["bits"] for layer in layers_of(result.folder).values()}) > 1


def test_only_the_given_bit_widths_are_used(tmp_path: Path) -> None:
    result = mixed(save_decoder(tmp_path / "source"), tmp_path / "scratch", target_bits=6.5, choices=(4, 8))
    bits = {layer["bits"] for layer in layers_of(result.folder).values() if layer.get("bits")}
    assert bits == {4, 8}


def test_bit_choice_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_decoder(tmp_path / "source")
    mixed(source, tmp_path / "scratch", target_bits=4.8)

    def again(*_: Any) -> None:
        raise AssertionError("the survey ran again")

    monkeypatch.setattr(Survey, "run", again)
    assert mixed(source, tmp_path / "scratch", target_bits=4.8).folder.is_dir()


def test_flops_of_forward_passes_and_hessians_match_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Panels that are as narrow relative to these small matrices as to large ones.
    monkeypatch.setattr("compress.stages.blockwise.block_pass._PANEL", 8)
    checkpoint, ids = save_decoder(tmp_path), some_ids(4, 16)
    decoder = build_blockwise_model(checkpoint)
    hidden, calls = decoder.embedded(ids), decoder.calls(ids)
    counted = 0
    for index in range(2):
        modules = linears(decoder.load(index), f"model.layers.{index}")
        run = partial(decoder.run, index, call=calls[index])
        work = BlockPass("block", modules, run, [lambda hidden=hidden: hidden])
        with torch.no_grad():
            groups = work._groups()
        monkeypatch.setattr(BlockPass, "_groups", lambda self, groups=groups: groups)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (hidden,) = work.solve(lambda names, hessian: None)
        monkeypatch.undo()
        products = counter.get_flop_counts()["Global"]
        counted += sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    config = Quantization(samples=4, sequence_length=16, guided=False)
    shape = read_shape(tmp_path)
    solver = 2 * 2 * (2 * 64 * 64 * 64 + 2 * 32 * 64 * 64 + 2 * 96 * 64 * 64 + 64 * 96 * 96)
    # Norms are counted as parameters and multiply nothing; a Hessian's diagonal panels are multiplied out in full.
    assert quantization_flops(config, shape) - solver == pytest.approx(counted, rel=0.2)


def test_flops_of_token_weights_match_torch(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path / "model"), some_ids(4, 16)
    plain, guided = (Quantization(samples=4, sequence_length=16, guided=guided) for guided in (False, True))
    work = Gradients(build_blockwise_model(checkpoint), guided, ids, tmp_path / "work", SilentProgress())
    with FlopCounterMode(display=False) as counter:
        work.importance()
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    shape = read_shape(checkpoint.folder)
    # Hessians that layers no longer share are not included.
    apart = 4 * 16 * 2 * 3 * 64**2
    expected = quantization_flops(guided, shape) - quantization_flops(plain, shape) - apart
    assert expected == pytest.approx(counted, rel=0.1)


def test_flops_and_memory_by_hand() -> None:
    shape = Shape(embeddings=1e6, attention=8e6, feed_forward=12e6, other=0, layers=2, hidden=100, intermediate=300)
    config = Quantization(samples=10, sequence_length=20, guided=False)
    forward, hessians = 2 * 20e6 * 200, 200 * 2 * (3 * 100**2 + 300**2)
    solver = 2 * (16e6 * 100 + 4e6 * 300)
    assert quantization_flops(config, shape) == forward + hessians + solver
    block, squares = 4 * 10e6, 4 * 4 * 300**2
    assert quantization_memory_bytes(config, shape) == block + squares + 4 * 4 * 200 * 300 + 2 * 4 * 200 * 100
    guided = Quantization(samples=10, sequence_length=20)
    apart = 200 * 2 * (6 * 100**2 + 300**2)
    assert quantization_flops(guided, shape) == 4 * forward + 4 * 1e6 * 200 + apart + solver
    assert quantization_memory_bytes(guided, shape) == quantization_memory_bytes(config, shape)
    # The logits of one long window, three times: 100,000 x 10,000 values of four bytes; and states of 100,000 x 100.
    long = Quantization(samples=1, sequence_length=100_000)
    assert quantization_memory_bytes(long, shape) == 3 * 4 * 100_000 * 10_000 + 2 * 4 * 100_000 * 100
    nearest = Quantization(method="rtn")
    assert quantization_flops(nearest, shape) == 0
    assert quantization_memory_bytes(nearest, shape) == 2 * block


@pytest.mark.parametrize("fields", [{}, {"embedding_bits": 4}, {"bits": 8, "group_size": -1}])
def test_folder_size_is_close_to_the_prediction(fields: dict[str, Any], tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", hidden_size=128, intermediate_size=256, vocab_size=1000)
    config = {"group_size": 32, "samples": 4, "sequence_length": 24, **fields}
    result = Gptq(**config).run(source, context(tmp_path / "scratch"))
    written = sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    shape = read_shape(source.folder)
    foretold = checkpoint_bytes(Quantization(**config), shape) - shape.processor_bytes
    assert foretold == pytest.approx(written, rel=0.06)
    assert size_bytes(result.folder) > written


SEED = 5


def measured(checkpoint: Checkpoint, ids: torch.Tensor, folder: Path, **config: object) -> Importance:
    settings = Quantization(precision="fp32", **config)
    return Gradients(build_blockwise_model(checkpoint), settings, ids, folder, SilentProgress(), SEED).importance()


def by_autograd(checkpoint: Checkpoint, ids: torch.Tensor) -> Importance:
    """Return the same gradients from one pass over all windows, with the same sampled tokens."""
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
        # The linear scaling that the architecture applies to embeddings.
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
def test_blockwise_gradients_equal_full_autograd(config: str, tmp_path: Path) -> None:
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


def test_token_weights_exclude_only_routed_experts(tmp_path: Path) -> None:
    token_weights = measured(save_decoder(tmp_path / "model", "Qwen2MoeConfig"), some_ids(2, 16), tmp_path / "work")
    assert not any(".experts." in name for name in token_weights.layers)
    assert "model.layers.0.mlp.shared_expert.down_proj" in token_weights.layers
    assert all(float(weights.mean()) == pytest.approx(1) for weights in token_weights.layers.values())


def test_token_weights_survive_a_round_trip(tmp_path: Path) -> None:
    token_weights = measured(save_decoder(tmp_path / "model"), some_ids(2, 16), tmp_path / "work")
    token_weights.write(tmp_path / "kept.safetensors")
    again = Importance.read(tmp_path / "kept.safetensors")
    assert again.layers.keys() == token_weights.layers.keys()
    assert all(torch.equal(again.layers[name], weights) for name, weights in token_weights.layers.items())
    assert torch.equal(again.head, token_weights.head) and torch.equal(again.embedding, token_weights.embedding)


def test_non_finite_gradient_is_reported(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path / "model")
    decoder = build_blockwise_model(checkpoint)
    fill = decoder.tensor

    def broken(module: str, leaf: str, shape: torch.Size) -> torch.Tensor:
        filled = fill(module, leaf, shape)
        return filled.fill_(float("nan")) if module == "model.norm" else filled

    decoder.tensor = broken  # type: ignore[method-assign]
    fill_surroundings(decoder)
    work = Gradients(decoder, Quantization(precision="fp32"), some_ids(2, 16), tmp_path / "work", SilentProgress())
    with pytest.raises(StageError, match="the answer is not finite"):
        work.importance()


@pytest.mark.parametrize("batches", [1, 3])
def test_token_weights_lower_the_weighted_error(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal layer inputs, token weights lower the weighted error and raise the plain one."""
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
        errors[guided] = quantized.dequantize()
    counts = Importance.read(tmp_path / "guided-True" / "importance.safetensors").layers[name]
    inputs = inputs_of_layers(module_of(checkpoint), calibration_sequences(stage_context, checkpoint, 12, 16))[name]
    weight = checkpoint.stored(f"{name}.weight").float()
    for weights, better in ((counts, True), (torch.ones_like(counts), False)):
        hessian = (inputs * weights[:, None]).T @ inputs
        output_errors = {guided: output_error(weight, errors[guided], hessian) for guided in errors}
        assert output_errors[better] < output_errors[not better]
