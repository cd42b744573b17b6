"""Tests of `prune` and `sparsify`: parts without influence on the output are removed first."""

from __future__ import annotations

import copy
import re
from typing import Any

import channel_nets
import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import nn

from compress.models.model import TorchModel
from compress.models.structure import TransformerBlock, blocks
from compress.models.transformer_pruning import HEADS_KEY, layer_list
from compress.stages.finetune import Finetune
from compress.stages.prune.stage import Prune
from compress.stages.prune.structured import _importance
from compress.stages.sparsify.magnitude import sparse_layers
from compress.stages.sparsify.stages import Sparsify, SparsifyGradually
from compress.tasks.inference import forward, tensors
from compress.utils.errors import StageError

SIZE = tiny.WIDTH // tiny.HEADS
QUICK = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}


def prune(model: TorchModel, **parameters: Any) -> TorchModel:
    return Prune(**parameters).run(model, tiny.context(tiny.dataset(48)))


def sparsify(model: TorchModel, gradually: bool = False, **parameters: Any) -> TorchModel:
    stage = SparsifyGradually(**parameters) if gradually else Sparsify(**parameters)
    return stage.run(model, tiny.context(tiny.dataset(48)))


def silence_heads(model: TorchModel, silent: list[int]) -> None:
    """Give head ``silent[layer]`` of each layer no influence: its columns of the output projection become zero."""
    with torch.no_grad():
        for block, head in zip(blocks(model.module), silent, strict=True):
            block.require_attention().output.weight[:, head * SIZE : (head + 1) * SIZE] = 0


def silence_neurons(model: TorchModel, silent: list[list[int]]) -> None:
    with torch.no_grad():
        for block, neurons in zip(blocks(model.module), silent, strict=True):
            block.require_feed_forward().output.weight[:, neurons] = 0


@pytest.mark.parametrize("silent", [[2, 0], [3, 1]])
def test_head_without_influence_is_removed_first(silent: list[int]):
    model = tiny.encoder()
    silence_heads(model, silent)
    expected, original = tiny.logits(model, tiny.texts(16)), copy.deepcopy(model)
    prune(model, heads=0.25)
    for block, old, gone in zip(blocks(model.module), blocks(original.module), silent, strict=True):
        rows = [row for row in range(tiny.WIDTH) if row // SIZE != gone]
        assert block.prunable_units == 3 and torch.equal(
            block.require_attention().value.weight, old.require_attention().value.weight[rows]
        )
        assert torch.equal(block.require_attention().output.weight, old.require_attention().output.weight[:, rows])
    torch.testing.assert_close(tiny.logits(model, tiny.texts(16)), expected, rtol=1e-4, atol=1e-5)


def test_neurons_without_influence_are_removed_first():
    model = tiny.encoder()
    silent = [list(range(0, 48, 4)), list(range(30, 42))]
    silence_neurons(model, silent)
    expected, original = tiny.logits(model, tiny.texts(16)), copy.deepcopy(model)
    prune(model, feed_forward=0.25)
    for block, old, gone in zip(blocks(model.module), blocks(original.module), silent, strict=True):
        rows = [row for row in range(tiny.NEURONS) if row not in gone]
        assert torch.equal(
            block.require_feed_forward().inputs[0].weight, old.require_feed_forward().inputs[0].weight[rows]
        )
    torch.testing.assert_close(tiny.logits(model, tiny.texts(16)), expected, rtol=1e-4, atol=1e-5)


def test_neurons_with_zero_activation_are_removed_first():
    # Their output weights are large, but their activations are always 0.
    silent, model = list(range(5, 17)), tiny.encoder()
    with torch.no_grad():
        for block in blocks(model.module):
            block.require_feed_forward().inputs[0].weight[silent] = 0
            block.require_feed_forward().inputs[0].bias[silent] = 0
            block.require_feed_forward().output.weight[:, silent] *= 50
    prune(model, feed_forward=0.25)
    for block in blocks(model.module):
        assert block.require_feed_forward().inputs[0].weight.abs().sum(1).min().item() > 0


def pass_on(layer: Any) -> None:
    """Turn a BERT layer into two layer norms, which leave a normalized input unchanged."""
    for part in (layer.attention.output, layer.output):
        torch.nn.init.zeros_(part.dense.weight)
        torch.nn.init.zeros_(part.dense.bias)


@pytest.mark.parametrize("idle", [(0,), (2,), (1, 3)])
def test_identity_layers_are_removed(idle: tuple[int, ...]):
    model = tiny.encoder(num_hidden_layers=2 + len(idle))
    for index in idle:
        pass_on(model.module.bert.encoder.layer[index])
    expected = tiny.logits(model, tiny.texts(16))
    layers = copy.deepcopy(layer_list(model.module))
    expected_weights = [layer.state_dict() for index, layer in enumerate(layers) if index not in idle]
    prune(model, layers=len(idle))
    assert model.module.config.num_hidden_layers == len(layer_list(model.module)) == 2
    for layer, state in zip(layer_list(model.module), expected_weights, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    torch.testing.assert_close(tiny.logits(model, tiny.texts(16)), expected, rtol=1e-4, atol=1e-4)


def test_sizes_after_structured_pruning():
    model = tiny.encoder(num_hidden_layers=3)
    parameters_before = model.parameters()
    prune(model, heads=0.5, feed_forward=0.75, layers=1)
    heads, neurons = tiny.HEADS // 2, tiny.NEURONS // 4
    width, attention = tiny.WIDTH, heads * SIZE
    layer = 3 * (width + 1) * attention + attention * width + width
    layer += 2 * neurons * width + neurons + width + 4 * width
    whole = 4 * (width + 1) * width + 2 * tiny.NEURONS * width + tiny.NEURONS + width + 4 * width
    assert parameters_before - model.parameters() == 3 * whole - 2 * layer
    config = model.module.config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, neurons)
    assert getattr(config, HEADS_KEY) == [heads, heads]
    assert tiny.logits(model, tiny.texts(8)).isfinite().all()


@pytest.mark.parametrize(("share", "left"), [(0.1, 43), (0.5, 24), (0.97, 1)])
def test_pruned_share_is_rounded_to_whole_neurons(share: float, left: int):
    model = prune(tiny.encoder(), feed_forward=share)
    assert model.module.config.intermediate_size == left == round(48 * (1 - share))


def test_pruning_on_data_leaves_no_gradients_and_no_hooks():
    model = prune(tiny.encoder(), heads=0.25, feed_forward=0.25)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.module.parameters())
    assert not any(part._forward_pre_hooks for part in model.module.modules())


def test_importance_uses_the_requested_number_of_examples():
    # One example gives another ranking than all of them; the sampled example depends on the seed.
    def kept(examples: int, seed: int = 0) -> torch.Tensor:
        stage = Prune(feed_forward=0.5, importance_examples=examples)
        model = stage.run(tiny.encoder(), tiny.context(tiny.dataset(48), seed=seed))
        return blocks(model.module)[0].require_feed_forward().inputs[0].weight

    assert torch.equal(kept(48), kept(1000)) and torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(48)) and not torch.equal(kept(1), kept(1, seed=1))


def zeros(model: TorchModel) -> list[int]:
    return [int((layer.weight == 0).sum()) for layer in list(sparse_layers(model.module).values())]


def sizes(model: TorchModel) -> list[int]:
    return [layer.weight.numel() for layer in list(sparse_layers(model.module).values())]


def test_the_smallest_weights_of_each_layer_become_zero():
    model = tiny.encoder()
    original = copy.deepcopy(model)
    sparsify(model, sparsity=0.37)
    assert zeros(model) == [int(0.37 * size) for size in sizes(model)]
    for layer, old in zip(
        list(sparse_layers(model.module).values()), list(sparse_layers(original.module).values()), strict=True
    ):
        nonzero = layer.weight != 0
        assert torch.equal(layer.weight[nonzero], old.weight[nonzero])
        assert old.weight[nonzero].abs().min() >= old.weight[~nonzero].abs().max()
    untouched = [name for name, _ in model.module.named_parameters() if "embeddings" in name or "classifier" in name]
    for name in untouched:
        assert torch.equal(model.module.get_parameter(name), original.module.get_parameter(name))


@pytest.mark.parametrize("epochs", [0.3, 3])
def test_cubic_schedule_ends_at_the_target_sparsity(epochs: float):
    model = tiny.encoder()
    sparsify(model, gradually=True, sparsity=0.6, **{**QUICK, "epochs": epochs})
    assert zeros(model) == [int(0.6 * size) for size in sizes(model)]


def test_sparsity_rises_step_by_step(monkeypatch: pytest.MonkeyPatch):
    from compress.stages.sparsify import magnitude

    seen: list[float] = []
    zero = magnitude._zero

    def watch(weights: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
        zero(weights, masks)
        seen.append(sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights))

    monkeypatch.setattr(magnitude, "_zero", watch)
    sparsify(tiny.encoder(), gradually=True, sparsity=0.5, **{**QUICK, "epochs": 10, "batch_size": 24})
    # 20 steps; sparsity rises over the first 14 as 0.5 (1 - (1 - t / 14)^3).
    expected = [0.5 * (1 - (1 - min(step, 14) / 14) ** 3) for step in range(1, 21)]
    assert seen == pytest.approx(expected, abs=2e-3)


def test_cubic_schedule_trains_remaining_weights():
    model = tiny.encoder()
    weights_before = [layer.weight.detach().clone() for layer in list(sparse_layers(model.module).values())]
    sparsify(model, gradually=True, sparsity=0.3, **QUICK)
    for layer, old in zip(list(sparse_layers(model.module).values()), weights_before, strict=True):
        nonzero = layer.weight != 0
        assert (layer.weight[nonzero] != old[nonzero]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"heads": 0.9}, "Removing 90% of 4 attention heads leaves none."),
        ({"feed_forward": 0.999}, "Removing 100% of 48 feed-forward neurons leaves none."),
        ({"layers": 2}, "Cannot remove 2 of 2 layers."),
        ({"layers": 5}, "Cannot remove 5 of 2 layers."),
    ],
)
def test_pruning_everything_is_refused(parameters: dict[str, Any], message: str):
    with pytest.raises(StageError, match=re.escape(message)):
        prune(tiny.encoder(), **parameters)


@pytest.mark.parametrize("parameters", [{}, {"heads": 1.0}, {"layers": -1}, {"heads": 0.5, "channel_multiple": 4}])
def test_parameters_that_contradict_each_other_are_refused(parameters: dict[str, Any]):
    with pytest.raises(ValidationError):
        Prune(**parameters)


def patterned(model: TorchModel, pattern: str) -> bool:
    """Return for each group of M inputs whether at most N weights are nonzero."""
    kept_count, of = map(int, pattern.split(":"))
    weights = [layer.weight for layer in sparse_layers(model.module).values()]
    matrices = [weight.movedim(1, -1).reshape(-1, of) for weight in weights]
    return all(bool(((matrix != 0).sum(1) == kept_count).all()) for matrix in matrices)


@pytest.mark.parametrize("gradually", [False, True])
def test_pattern_is_exact_and_kept_during_training(gradually: bool):
    model, context = tiny.encoder(), tiny.context(tiny.dataset(48))
    stage = SparsifyGradually(pattern="1:4", **QUICK) if gradually else Sparsify(pattern="1:4")
    stage.run(model, context)
    assert patterned(model, "1:4")
    weights_before = [layer.weight.detach().clone() for layer in sparse_layers(model.module).values()]
    Finetune(**QUICK).run(model, context)
    assert patterned(model, "1:4")
    assert not any(
        torch.equal(layer.weight, old)
        for layer, old in zip(sparse_layers(model.module).values(), weights_before, strict=True)
    )


def test_stage_reports_sparsity():
    model, context = tiny.encoder(), tiny.context()
    names = list(sparse_layers(model.module))
    Sparsify(pattern="2:4").run(model, context)
    zeros = sum(int((model.module.bert.get_parameter(f"{name}.weight") == 0).sum()) for name in names)
    assert f"50.00% of the weights of {len(names)} layers are zero in the pattern 2:4" in context.notes[0]
    assert f"{zeros / model.parameters():.1%} of all parameters" in context.notes[0]


def test_pattern_that_does_not_divide_layers_is_refused():
    with pytest.raises(StageError, match="query, and 12 layers more, cannot hold the pattern 2:5: it has 32 inputs"):
        sparsify(tiny.encoder(), pattern="2:5")


def test_convolutions_except_first_and_depthwise_become_sparse():
    model = channel_nets.plain()
    names = list(sparse_layers(model.module))
    assert names == ["grouped", "expand", "squeeze", "excite", "project", "hidden"]
    with pytest.raises(StageError, match="cannot hold"):
        Sparsify(pattern="2:16").run(model, tiny.context())
    Sparsify(pattern="1:2").run(model, tiny.context())
    assert patterned(model, "1:2")


@pytest.mark.parametrize(
    "parameters",
    [
        {"pattern": "2:4", "sparsity": 0.5},
        {"pattern": "4:4"},
        {"pattern": "4x1"},
        {"pattern": "two of four"},
        {},
        {"sparsity": 1.0},
    ],
)
def test_invalid_patterns_are_refused(parameters: dict[str, Any]):
    with pytest.raises(ValidationError):
        Sparsify(**parameters)


def gated(linear: nn.Linear, gates: torch.Tensor) -> Any:
    return linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gates,))


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_importance_is_the_sum_of_absolute_gate_gradients(architecture: str):
    model, context = tiny.encoder(architecture), tiny.context(tiny.dataset(50))
    examples = context.encode("train", model)
    found: list[TransformerBlock] = blocks(model.module)
    heads = [torch.ones(tiny.HEADS, requires_grad=True) for _ in found]
    neurons = [torch.ones(tiny.NEURONS, requires_grad=True) for _ in found]
    expected = [torch.zeros_like(gates) for gates in (*heads, *neurons)]
    for index in range(len(examples)):
        hooks = [
            gated(block.require_attention().output, g.repeat_interleave(SIZE))
            for block, g in zip(found, heads, strict=True)
        ]
        hooks += [gated(block.require_feed_forward().output, g) for block, g in zip(found, neurons, strict=True)]
        batch = tensors(examples, [index])
        loss = nn.functional.cross_entropy(forward(model.module, batch).logits, batch["labels"])
        for total, gradient in zip(expected, torch.autograd.grad(loss, [*heads, *neurons]), strict=True):
            total += gradient.abs()
        for hook in hooks:
            hook.remove()
    head_scores, neuron_scores = _importance(model.module, found, examples, context)
    for score, total in zip([*head_scores, *neuron_scores], expected, strict=True):
        torch.testing.assert_close(score, total, rtol=1e-3, atol=1e-4)
        assert total.std() > 0.01
