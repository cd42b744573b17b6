"""Tests of quantized mixtures of experts: each matrix solved on tokens routed to it, and starved experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoders import MIXTURES, Notes, context, layers_of, module_of, save_decoder, some_ids
from decoders import SMALL as SMALL_DECODER
from quantized import tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.experts import find_separate_experts
from compress.models.quantized_module import load_quantized_module
from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.stages.blockwise.block_pass import BlockPass, gram
from compress.stages.blockwise.blockwise_model import build_blockwise_model, logits
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.blockwise.layers import linears, plan_layers
from compress.stages.gptq.bit_allocation import Survey
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

SMALL = {"group_size": 32, "samples": 6, "sequence_length": 24, "precision": "fp32", "expert_tokens": 16}
SMALL_MODEL = {name: value for name, value in SMALL_DECODER.items() if name != "intermediate_size"}
EXPERTS = "model.layers.{}.block_sparse_moe.experts"


def quantized(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> QuantizedCheckpoint:
    tables = {} if fields.keys() & {"target_bits", "max_bytes"} else {"embedding_bits": 16}
    return Gptq(**{**SMALL, **tables, **fields}).run(source, context(scratch, progress=notes))


def routed(module: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return hidden states, chosen experts and routing weights of transformers' fused experts in each block."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for part in module.modules():
        if hasattr(part, "gate_up_proj"):
            part.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        module(input_ids=ids)
    return seen


@torch.no_grad()
def inputs_of_experts(module: Any, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return for each expert layer its inputs over all tokens and a mask of the tokens routed to it.

    Computed directly from the fused weights of a Mixtral; keys are the checkpoint's layer names.
    """
    inputs = {}
    for index, (hidden, chosen, _) in enumerate(routed(module, ids)):
        fused = module.model.layers[index].mlp.experts
        for number in range(4):
            is_routed = (chosen == number).any(-1)
            gate, up = (hidden @ fused.gate_up_proj[number].T).chunk(2, dim=-1)
            name = f"{EXPERTS.format(index)}.{number}"
            inputs |= {f"{name}.{leaf}": (hidden, is_routed) for leaf in ("w1", "w3")}
            inputs[f"{name}.w2"] = (nn.functional.silu(gate) * up, is_routed)
    return inputs


@pytest.mark.parametrize("config", MIXTURES)
def test_module_names_equal_tensor_names_in_files(config: str, tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, config)
    decoder = build_blockwise_model(checkpoint)
    assert set(decoder.model.state_dict()) == set(checkpoint.files)
    last = find_separate_experts(decoder.blocks[1], "model.layers.1")
    assert [module.count for module in last.values()] == [4]


@pytest.mark.parametrize("config", MIXTURES)
def test_quantized_mixture_matches_dequantized_weights(config: str, tmp_path: Path) -> None:
    # Reference: transformers' fused experts with the dequantized weights.
    source = save_decoder(tmp_path / "source", config)
    result = quantized(source, tmp_path / "scratch")
    layers = layers_of(result.folder)
    experts = [name for name, layer in layers.items() if ".experts." in name and layer.get("bits")]
    assert len(experts) == 4 * 3 * (1 if "Deepseek" in config else 2)
    router_layers = [name for name in source.files if name.endswith(("gate.weight", "expert_gate.weight"))]
    assert len(router_layers) >= (1 if "Deepseek" in config else 2)
    for name in router_layers:
        assert torch.equal(result.stored(name), source.stored(name).half())
        assert (layers.get(name) or layers[name.removesuffix(".weight")])["why"]
    state = {
        name: (result.weight(name.removesuffix(".weight")) if name.endswith(".weight") else result.stored(name))
        for name in source.files
    }
    folder = tmp_path / "float"
    folder.mkdir()
    save_file({name: tensor.float().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source.config))
    ids = some_ids(2, 20)
    with torch.no_grad():
        expected = module_of(Checkpoint(folder))(input_ids=ids).logits
        answered = load_quantized_module(result)(input_ids=ids).logits
        float_logits = module_of(source)(input_ids=ids).logits
    torch.testing.assert_close(answered, expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logits(result, ids), expected, atol=2e-4, rtol=1e-3)
    assert float((expected - float_logits).abs().max()) > 0.05


@pytest.mark.parametrize("batches", [1, 3])
def test_expert_hessians_use_routed_tokens_only(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory for two Hessians of the wider inputs, so that experts need several passes over the text.
    monkeypatch.setattr("compress.stages.blockwise.block_pass.HESSIAN_BYTES", 2 * 4 * 64 * 64)
    checkpoint, ids = save_decoder(tmp_path, "MixtralConfig"), some_ids(6, 10)
    expected = inputs_of_experts(module_of(checkpoint), ids)
    counts = {name: int(is_routed.sum()) for name, (_, is_routed) in expected.items()}
    minimum = sorted(counts.values())[len(counts) // 2]
    assert min(counts.values()) < minimum < max(counts.values())
    decoder, seen, sent = build_blockwise_model(checkpoint), {}, {}
    hidden, rows = decoder.embedded(ids), len(ids) // batches
    for index in range(2):
        name = f"model.layers.{index}"
        modules = linears(decoder.load(index), name)
        calls = {count: decoder.calls(ids[:count])[index] for count in (1, rows)}
        parts = [lambda at=at, hidden=hidden: hidden[at : at + rows] for at in range(0, len(ids), rows)]
        work = BlockPass(
            name,
            modules,
            lambda given, index=index, calls=calls: decoder.run(index, given, calls[len(given)]),
            parts,
            find_separate_experts(decoder.blocks[index], name),
            minimum,
        )

        def note(layers: Sequence[str], hessian: torch.Tensor, work: BlockPass = work) -> None:
            for layer in layers:
                seen[layer], sent[layer] = hessian.clone(), work.sent(layer)

        with torch.no_grad():
            hidden = torch.cat(list(work.solve(note)))
    for name, (inputs, is_routed) in expected.items():
        given, missing = inputs.double(), max(minimum - counts[name], 0)
        hessian = given[is_routed].T @ given[is_routed] + missing * given.T @ given / len(given)
        torch.testing.assert_close(seen[name].double(), hessian / (counts[name] + missing), atol=1e-4, rtol=1e-3)
    assert {name: sent[name] for name in counts} == counts
    assert sent["model.layers.0.self_attn.q_proj"] is None
    with torch.no_grad():
        plain = module_of(checkpoint).model(input_ids=ids, output_hidden_states=True).hidden_states
    # The last of transformers' hidden states includes the final norm.
    torch.testing.assert_close(decoder.normed(hidden), plain[-1], atol=1e-4, rtol=1e-4)
    assert all(
        part.calibration is None for block in decoder.blocks for part in find_separate_experts(block, "").values()
    )


def test_row_weights_equal_repeated_rows() -> None:
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    repeated = inputs.repeat_interleave(weights.long(), dim=0)
    torch.testing.assert_close(gram(inputs, weights), gram(repeated))


def sleepy(folder: Path) -> Checkpoint:
    """Save a Mixtral whose router chooses one expert, never the last: logits are v x, -v x, u x and 0."""
    source = save_decoder(folder, "MixtralConfig", num_experts_per_tok=1)
    tensors = load_file(source.folder / "model.safetensors")
    for index in range(2):
        rows = tensors[f"model.layers.{index}.block_sparse_moe.gate.weight"]
        rows[1], rows[3] = -rows[0], 0
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.mark.parametrize("minimum", [1, 40])
def test_starved_experts_are_quantized_and_reported(minimum: int, tmp_path: Path) -> None:
    source, notes = sleepy(tmp_path / "source"), Notes()
    result = quantized(source, tmp_path / "scratch", notes, expert_tokens=minimum, bits=8)
    ids = calibration_sequences(context(tmp_path), source, 6, 24)
    chosen = [
        torch.bincount(choice.flatten(), minlength=4)
        for _, choice, _ in routed(module_of(result_of(source, result)), ids)
    ]
    layers = layers_of(result.folder)
    starved = set()
    for index, number in ((index, number) for index in range(2) for number in range(4)):
        name = f"{EXPERTS.format(index)}.{number}"
        for layer in (layers[f"{name}.{leaf}"] for leaf in ("w1", "w2", "w3")):
            assert layer["tokens"] == int(chosen[index][number])
            assert layer.get("starved", False) is (layer["tokens"] < minimum)
            assert layer["bits"] == 8 and 0 < layer["error"] < 1e-3
        starved |= {name} if chosen[index][number] < minimum else set()
    assert f"{EXPERTS.format(0)}.3" in starved and len(starved) >= 2
    (line,) = [line for line in notes.said if "starved" in line]
    assert f"{len(starved)} of 8 experts" in line and f"fewer than {minimum} tokens" in line
    assert f"{EXPERTS.format(1)}.3 (0)" in line


def result_of(source: Checkpoint, result: QuantizedCheckpoint) -> Checkpoint:
    """Return the float model with the weights of the quantized checkpoint."""
    folder = result.folder.parent / "float"
    folder.mkdir()
    tensors = {name: result.weight(name.removesuffix(".weight")).contiguous() for name in source.files}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source.config))
    return Checkpoint(folder)


def test_no_note_without_starved_experts(tmp_path: Path) -> None:
    notes = Notes()
    result = quantized(save_decoder(tmp_path / "source", "MixtralConfig"), tmp_path / "scratch", notes, expert_tokens=1)
    layers = layers_of(result.folder).values()
    assert sum(layer.get("tokens", 0) for layer in layers) == 2 * 3 * 2 * 6 * 24
    assert not any("starved" in layer for layer in layers)
    assert not any("starved" in line for line in notes.said)


def test_round_to_nearest_reports_no_token_counts(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "MixtralConfig")
    layers = layers_of(quantized(source, tmp_path / "scratch", method="rtn").folder)
    expert = layers[f"{EXPERTS.format(0)}.2.w1"]
    assert expert["bits"] == 4 and "tokens" not in expert and "starved" not in expert


def test_sensitivity_of_a_matrix_is_split_among_experts(tmp_path: Path) -> None:
    source, ids, config = sleepy(tmp_path / "source"), some_ids(2, 40), Quantization(**SMALL)
    decoder = build_blockwise_model(source)
    survey = Survey(decoder, config, plan_layers(decoder, config), (2, 3, 8), SilentProgress(), tmp_path)
    losses = survey.run(ids, {}, lambda hessian: {})
    assert len(losses) == 2 * (4 + 4 * 3)
    module, places = module_of(source), torch.linspace(0, 39, 32).round().long()

    def answers() -> torch.Tensor:
        with torch.no_grad():
            log_chances: torch.Tensor = module(input_ids=ids[:1]).logits[0, places].double().log_softmax(-1)
        return log_chances

    original = answers()
    inputs = inputs_of_experts(module, ids[:1])
    for index in range(2):
        fused = module.model.layers[index].mlp.experts
        down = fused.down_proj.data.clone()
        _, chosen, _ = routed(module, ids[:1])[index]
        changes, tokens = [], torch.bincount(chosen.flatten(), minlength=4)
        for number in range(4):
            name = f"{EXPERTS.format(index)}.{number}.w2"
            given, is_routed = inputs[name]
            missing = max(16 - int(tokens[number]), 0)
            importance = (given[is_routed].square().sum(0) + missing * given.square().mean(0)) / (
                tokens[number] + missing
            )
            fused.down_proj.data[number] = round_to_nearest(down[number], GptqSettings(3, 32), importance).dequantize()
            # One expert a token, of the weight 1.
            changes.append(float((given[is_routed] @ (fused.down_proj.data[number] - down[number]).T).square().sum()))
        coarse = answers()
        fused.down_proj.data.copy_(down)
        price = float((original.exp() * (original - coarse)).sum() / 32)
        average = sum(changes) / int(tokens.sum())
        for number in range(4):
            share = (changes[number] + average) / (sum(changes) + 4 * average)
            expert_loss = losses[f"{EXPERTS.format(index)}.{number}.w2"]
            assert expert_loss[3] == pytest.approx(share * price, rel=0.05)
            assert expert_loss[2] > expert_loss[3] > expert_loss[8] > 0
        least = min(range(4), key=lambda number: losses[f"{EXPERTS.format(index)}.{number}.w2"][3])
        assert least == 3


def test_experts_get_individual_bit_widths(tmp_path: Path) -> None:
    source = sleepy(tmp_path / "source")
    result = quantized(source, tmp_path / "scratch", target_bits=5.0, choices=(2, 4, 8), embedding_bits=8)
    layers = layers_of(result.folder)
    bits = {name: layer["bits"] for name, layer in layers.items() if ".experts." in name}
    assert all(bits[f"{EXPERTS.format(index)}.3.{leaf}"] == 2 for index in range(2) for leaf in ("w1", "w2", "w3"))
    assert len(set(bits.values())) > 1
    for name, some in bits.items():
        expert_matrix = result.quantized(name)
        assert expert_matrix is not None and expert_matrix.bits == some


REFUSED = {
    "GptOssConfig": (
        {"num_local_experts": 4, "head_dim": 16, "intermediate_size": 32},
        "GptOssExperts keeps its experts with its matrices transposed, with gate and up interleaved, with biases",
    ),
    "GraniteMoeConfig": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
        "checkpoints of this architecture keep all experts in one tensor",
    ),
}


@pytest.mark.parametrize("config", REFUSED)
def test_inseparable_experts_are_refused_before_any_work(config: str, tmp_path: Path) -> None:
    fields, why = REFUSED[config]
    source = save_other(tmp_path / "source", config, fields)
    with pytest.raises(ModelError, match="experts of 2 blocks cannot be quantized one by one") as caught:
        quantized(source, tmp_path / "scratch")
    assert why in str(caught.value) and "keep: ['*.experts.*']" in str(caught.value)
    assert not (tmp_path / "scratch").exists()


def test_kept_experts_need_not_be_separable(tmp_path: Path) -> None:
    source = save_other(tmp_path / "source", "GptOssConfig", REFUSED["GptOssConfig"][0])
    result = quantized(source, tmp_path / "scratch", keep=("*.experts.*",))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(result.stored(name), source.stored(name).half())
    assert layers_of(result.folder)[name]["why"] == "kept by the pattern '*.experts.*'"
    assert result.quantized("model.layers.0.self_attn.q_proj") is not None


def save_other(folder: Path, config: str, fields: dict[str, Any]) -> Checkpoint:
    """Save a decoder of an architecture that `save_decoder` doesn't support."""
    torch.manual_seed(0)
    model = getattr(transformers, config)(**SMALL_MODEL, **fields)
    transformers.AutoModelForCausalLM.from_config(model).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint(folder)


def test_unsupported_expert_storage_is_reported(tmp_path: Path) -> None:
    tensors = load_file(save_decoder(tmp_path, "MixtralConfig").folder / "model.safetensors")
    name = f"{EXPERTS.format(1)}.2.w3.weight"
    tensors["model.layers.1.experts.w3"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"no tensor '{name}' for an expert of MixtralForCausalLM") as caught:
        build_blockwise_model(Checkpoint(tmp_path))
    assert "save_pretrained" in str(caught.value)
