"""Sensitivity against one-layer-at-a-time runs in transformers; allocation by hand; mixed bits from end to end."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Notes, context, layers_of, module_of, save_decoder, some_ids
from safetensors.torch import load_file, save_file
from torch import nn

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.stages.blockwise.blockwise_model import build_blockwise_model
from compress.stages.blockwise.layers import Layer, plan_layers
from compress.stages.gptq.bit_allocation import TABLES, Sensitivity, Survey, allocate, average_bits, stored_bits
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

CONFIG = Quantization(group_size=32, precision="fp32")
LENGTH = 40


def log_probabilities(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """At the 32 positions that the survey judges."""
    with torch.no_grad():
        logits = module(input_ids=ids).logits
    places = torch.linspace(0, LENGTH - 1, 32).round().long()
    return logits[0, places].double().log_softmax(-1)


def divergence(original: torch.Tensor, other: torch.Tensor) -> float:
    return float((original.exp() * (original - other)).sum() / len(original))


def test_prices_are_divergences_of_models_with_one_coarse_layer(tmp_path: Path) -> None:
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


def test_a_layer_takes_integers_scales_and_zero_points() -> None:
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
@pytest.mark.parametrize("together", [(), (("one",), ("two", "three")), (("three", "one"),)])
def test_the_choice_is_the_best_of_all_within_the_budget(target: float, together: tuple[tuple[str, ...], ...]) -> None:
    layers, tables, sensitivity = problem()
    flat = [layer for block in layers for layer in block]
    parameters = sum(layer.rows * layer.columns for layer in (*flat, *tables)) + 50
    chosen = allocate(Quantization(target_bits=target), layers, tables, parameters, sensitivity, (4, 8, 16), together)
    names = [layer.name for layer in flat]
    best = (float("inf"), ())
    for *bits, table in itertools.product((2, 4, 8), (2, 4, 8), (2, 4, 8), (4, 8, 16)):
        if any(len({bits[names.index(name)] for name in alike}) > 1 for alike in together):
            continue
        size = sum(stored_bits(layer, some, True) for layer, some in zip(flat, bits, strict=True)) + 50 * 16
        size += stored_bits(tables[0], table, True)
        loss = sum(sensitivity[layer.name][some] for layer, some in zip(flat, bits, strict=True))
        loss += sensitivity[TABLES][table]
        if size <= target * parameters:
            best = min(best, (loss, (*bits, table)))
    assert (*(chosen.bits[name] for name in names), chosen.tables) == best[1]
    assert chosen.divergence == pytest.approx(best[0])
    assert 0 < chosen.average <= target


def test_bytes_are_a_budget_too() -> None:
    layers, tables, sensitivity = problem()
    parameters = 32 * 32 + 64 * 32 + 32 * 64 + 96 * 32
    average = allocate(Quantization(target_bits=5.5), layers, tables, parameters, sensitivity, (4, 8, 16))
    limit = int(5.5 * parameters / 8)
    assert allocate(Quantization(max_bytes=limit), layers, tables, parameters, sensitivity, (4, 8, 16)) == average


def test_a_budget_that_nothing_fits_says_what_is_possible() -> None:
    layers, tables, sensitivity = problem()
    parameters = 32 * 32 + 64 * 32 + 32 * 64 + 96 * 32
    least = (5120 * 2 + 160 * 16 + 96 * 32 * 4 + 96 * 16) / parameters
    with pytest.raises(StageError, match=rf"target_bits: 3: the least possible is {least:.2f} bits on average"):
        allocate(Quantization(target_bits=3), layers, tables, parameters, sensitivity, (4, 8, 16))


def mixed(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> QuantizedCheckpoint:
    stage = Gptq(group_size=32, samples=6, sequence_length=LENGTH, precision="fp32", **fields)
    return stage.run(source, context(scratch, progress=notes))


def test_layers_that_matter_little_get_few_bits(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("fused", [True, False])
def test_layers_of_one_input_get_the_same_bits_if_asked_to(tmp_path: Path, fused: bool) -> None:
    tensors = load_file(save_decoder(tmp_path / "source").folder / "model.safetensors")
    # Whatever is asked of these keys, they answer next to nothing: by themselves they get the fewest bits.
    tensors["model.layers.0.self_attn.k_proj.weight"] *= 1e-4
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    mixed_model = mixed(Checkpoint(tmp_path / "source"), tmp_path / "scratch", target_bits=4.8, fused=fused)
    bits = {name: layer["bits"] for name, layer in layers_of(mixed_model.folder).items() if ".layers." in name}
    sets = [{bits[f"model.layers.{block}.self_attn.{part}_proj"] for part in "qkv"} for block in (0, 1)]
    sets += [{bits[f"model.layers.{block}.mlp.{part}_proj"] for part in ("gate", "up")} for block in (0, 1)]
    assert all(len(bit_widths) == 1 for bit_widths in sets) == fused
    assert len(set(bits.values())) > 1


def test_files_say_the_bits_of_each_layer_as_gptqmodel_reads_them(tmp_path: Path) -> None:
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


def test_choices_are_kept_to(tmp_path: Path) -> None:
    result = mixed(save_decoder(tmp_path / "source"), tmp_path / "scratch", target_bits=6.5, choices=(4, 8))
    bits = {layer["bits"] for layer in layers_of(result.folder).values() if layer.get("bits")}
    assert bits == {4, 8}


def test_bits_are_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_decoder(tmp_path / "source")
    mixed(source, tmp_path / "scratch", target_bits=4.8)

    def again(*_: Any) -> None:
        raise AssertionError("the survey ran again")

    monkeypatch.setattr(Survey, "run", again)
    assert mixed(source, tmp_path / "scratch", target_bits=4.8).folder.is_dir()
