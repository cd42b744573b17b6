"""Tests of the training loop: reproducibility, schedule, coverage of examples and final state."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from stage_context import Notes
from torch import nn

from compress.models.model import TorchModel
from compress.stages.sparsify.magnitude import keep_zeros, sparse_layers
from compress.stages.training.loop import LengthGroupedBatches, Trainee, train
from compress.stages.training.settings import Optimizer, Training
from compress.tasks.inference import forward, predict, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress
from compress.utils.torch_device import uses_bf16

FAST = Training(epochs=1, learning_rate=1e-3, batch_size=8, precision="fp32")


def classifier() -> tuple[TorchModel, Examples]:
    model = tiny.encoder()
    return model, tiny.context().encode("train", model)


def task_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(forward(module, batch).logits, batch["labels"])


def trained(config: Training = FAST, seed: int = 0, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, examples = classifier()
    losses = train(Trainee(model.module, examples, task_loss, **options), config, seed, SilentProgress(), "test")
    return model.module.state_dict(), losses


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def points(count: int, lengths: list[int] | None = None) -> Examples:
    """Return examples without content, of the given lengths."""
    lengths = lengths or [1] * count
    return Examples([{"x": np.ones(length, np.int64)} for length in lengths], {"x": 0}, np.zeros(count, np.int64))


def test_same_seed_is_bit_identical_and_another_differs():
    # The tiny BERT has dropout, so that the random state matters beside the order of batches.
    weights, losses = trained()
    again, same_losses = trained()
    assert same(weights, again) and losses == same_losses
    assert not same(weights, trained(seed=1)[0])


def test_training_lowers_the_loss_and_ends_in_eval_mode():
    model, examples = classifier()
    config = FAST.model_copy(update={"epochs": 12.0, "learning_rate": 3e-3})
    losses = train(Trainee(model.module, examples, task_loss), config, 0, SilentProgress(), "test")
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    assert not model.module.training
    assert (predict(model.module, examples).argmax(1) == examples.labels).mean() > 0.9


def test_learning_rate_rises_and_falls_linearly():
    # A single weight under a gradient of constant sign: Adam's step is then the learning rate itself.
    layer = nn.Linear(1, 1, bias=False)
    places = [layer.weight.item()]
    trainee = Trainee(
        layer,
        points(20),
        loss=lambda module, batch: module.weight.sum() * 3,
        after_step=lambda step, steps: places.append(layer.weight.item()),
    )
    config = Training(
        epochs=1, learning_rate=0.01, batch_size=2, optimizer={"warmup_ratio": 0.4, "weight_decay": 0}, precision="fp32"
    )
    train(trainee, config, 0, SilentProgress(), "test")
    steps = -np.diff(places)
    # Ten steps: four rise by quarters of the peak, then the peak and five equal steps down.
    expected = 0.01 * np.array([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(steps, expected, rtol=1e-3)


def test_weights_decay_and_biases_do_not():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    extra = nn.Parameter(torch.ones(2, 2))
    trainee = Trainee(
        layer,
        points(1),
        loss=lambda module, batch: (module.weight.sum() + module.bias.sum() + extra.sum()) * 0,
        extra=[extra],
    )
    config = Training(
        epochs=1, learning_rate=0.1, batch_size=1, optimizer={"warmup_ratio": 0, "weight_decay": 0.5}, precision="fp32"
    )
    train(trainee, config, 0, SilentProgress(), "test")
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
    assert bool((layer.bias == 1).all()) and bool((extra == 1).all())


def test_extra_parameters_are_trained():
    layer, extra = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))
    trainee = Trainee(
        layer, points(4), loss=lambda module, batch: (module.bias + extra - 5).square().sum(), extra=[extra]
    )
    train(trainee, FAST, 0, SilentProgress(), "test")
    assert extra.item() > 0


def test_gradients_are_clipped_to_their_global_norm():
    layer, seen = nn.Linear(3, 1, bias=False), []
    original = torch.optim.AdamW.step

    def watch(optimizer: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(float(layer.weight.grad.norm()))
        return original(optimizer, *arguments, **options)

    config = FAST.model_copy(update={"optimizer": Optimizer(max_gradient_norm=0.25)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        train(
            Trainee(layer, points(8), lambda module, batch: module.weight.sum() * 100), config, 0, SilentProgress(), "t"
        )
    assert seen == pytest.approx([0.25], rel=1e-4)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 3), (8, 4), (401, 4), (410, 8)])
def test_an_epoch_shows_each_example_once(count: int, batch_size: int):
    lengths = np.random.default_rng(0).integers(1, 60, count)
    batches = list(sampler := LengthGroupedBatches(lengths, batch_size, seed=3))
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == len(sampler) and all(1 <= len(batch) <= batch_size for batch in batches)


def test_batches_hold_similar_lengths_in_an_order_that_changes():
    lengths = np.random.default_rng(0).integers(1, 100, 4000)
    sampler = LengthGroupedBatches(lengths, 8, seed=3)
    first, second = list(sampler), list(sampler)
    again = LengthGroupedBatches(lengths, 8, seed=3)
    assert first != second and list(again) == first and list(again) == second
    assert list(LengthGroupedBatches(lengths, 8, seed=4)) != first
    padded = sum(len(batch) * max(lengths[batch]) for batch in first)
    order = np.random.default_rng(1).permutation(4000).reshape(-1, 8)
    assert padded < 1.1 * lengths.sum() < 1.5 * lengths.sum() < sum(8 * max(lengths[batch]) for batch in order)
    # Short and long batches come mixed, not sorted.
    means = [float(lengths[batch].mean()) for batch in LengthGroupedBatches(lengths[:400], 8, seed=3)]
    assert abs(np.corrcoef(means, range(50))[0, 1]) < 0.5


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 5), (1, 10), (2.3, 23), (0.01, 1)])
def test_fractional_epochs_are_rounded_to_steps(epochs: float, steps: int):
    seen: list[tuple[int, int]] = []
    trainee = Trainee(
        nn.Linear(1, 1),
        points(20),
        loss=lambda module, batch: module.weight.sum(),
        after_step=lambda step, total: seen.append((step, total)),
    )
    config = FAST.model_copy(update={"epochs": epochs, "batch_size": 2})
    losses = train(trainee, config, 0, SilentProgress(), "test")
    assert seen == [(step + 1, steps) for step in range(steps)]
    assert len(losses) == int(np.ceil(steps / 10))


def test_losses_are_means_of_their_epoch():
    values = iter([1.0, 2.0, 3.0, 4.0, 10.0])
    trainee = Trainee(nn.Linear(1, 1), points(4), lambda module, batch: module.weight.sum() * 0 + next(values))
    config = FAST.model_copy(update={"epochs": 2.5, "batch_size": 2})
    assert train(trainee, config, 0, SilentProgress(), "test") == [1.5, 3.5, 10.0]


def test_every_example_is_seen_with_its_own_label_and_position():
    _, examples = classifier()
    seen: dict[int, int] = {}

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for row, index in enumerate(batch["index"].tolist()):
            seen[index] = int(batch["labels"][row])
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            assert ids.tolist() == examples.inputs[index]["input_ids"].tolist()
        return module.weight.sum()

    train(Trainee(nn.Linear(1, 1), examples, loss), FAST, 0, SilentProgress(), "test")
    assert examples.labels is not None and seen == dict(enumerate(examples.labels.tolist()))


def figures(values: list[float], kept: list[dict[str, torch.Tensor]], module: nn.Module) -> Any:
    """Return a validation that yields ``values`` in turn and records the weights it saw."""
    left: Iterator[float] = iter(values)

    def validate() -> float:
        assert not module.training
        kept.append(copy.deepcopy(module.state_dict()))
        return next(left)

    return validate


@pytest.mark.parametrize(
    ("merits", "best"), [([0.1, 0.9, 0.5], 1), ([0.9, 0.1, 0.5], 0), ([0.1, 0.2, 0.3], 2), ([0.5, 0.7, 0.7], 1)]
)
def test_best_epoch_is_restored(merits: list[float], best: int):
    model, examples = classifier()
    states: list[dict[str, torch.Tensor]] = []
    trainee = Trainee(model.module, examples, task_loss, validate=figures(merits, states, model.module))
    train(trainee, FAST.model_copy(update={"epochs": 3.0}), 0, SilentProgress(), "test")
    assert [same(model.module.state_dict(), state) for state in states] == [epoch == best for epoch in range(3)]


def test_validation_loss_is_shown_as_it_is_and_the_epoch_with_the_smallest_is_restored():
    model, examples = classifier()
    states: list[dict[str, torch.Tensor]] = []
    validate = figures([1.5, 0.25, 0.75], states, model.module)
    trainee = Trainee(model.module, examples, task_loss, validate=validate, validates_loss=True)
    notes = Notes()
    train(trainee, FAST.model_copy(update={"epochs": 3.0}), 0, notes, "test")
    assert [same(model.module.state_dict(), state) for state in states] == [False, True, False]
    assert [note.rpartition(", ")[2] for note in notes.said] == [
        "validation loss 1.5000",
        "validation loss 0.2500",
        "validation loss 0.7500",
    ]


def test_last_epoch_is_kept_if_keep_best_is_off():
    model, examples = classifier()
    states: list[dict[str, torch.Tensor]] = []
    validate = figures([0.9, 0.1], states, model.module)
    trainee = Trainee(model.module, examples, task_loss, validate=validate, keep_best=False)
    notes = Notes()
    train(trainee, FAST.model_copy(update={"epochs": 2.0}), 0, notes, "test")
    assert same(model.module.state_dict(), states[1])
    assert "validation 0.9000" in notes.said[0] and "validation 0.1000" in notes.said[1]


def test_validation_does_not_affect_training():
    model, examples = classifier()
    trainee = Trainee(model.module, examples, task_loss, validate=lambda: 0.0, keep_best=False)
    train(trainee, FAST, 0, SilentProgress(), "test")
    assert same(model.module.state_dict(), trained()[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_names_the_step(bad: float):
    count = 0

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal count
        count += 1
        return module.weight.sum() * (bad if count == 3 else 1)

    layer = nn.Linear(1, 1)
    with pytest.raises(StageError, match=f"became -?{bad} at step 3 of 10") as caught:
        train(Trainee(layer, points(80), loss), FAST, 0, SilentProgress(), "test")
    assert "learning_rate" in str(caught.value.hint)
    assert bool(layer.weight.isfinite().all())


def test_zero_weights_stay_zero_and_others_are_trained():
    model, examples = classifier()
    layers = list(sparse_layers(model.module).values())
    assert len(layers) == 2 * 6 + 1
    with torch.no_grad():
        for layer in layers[:-1]:
            layer.weight[:, ::2] = 0
    zeros = [layer.weight == 0 for layer in layers]
    weights_before = [layer.weight.detach().clone() for layer in layers]
    trainee = Trainee(model.module, examples, task_loss, after_step=keep_zeros(model.module))
    train(trainee, FAST, 0, SilentProgress(), "test")
    for layer, old, zero in zip(layers[:-1], weights_before[:-1], zeros[:-1], strict=True):
        assert torch.equal(layer.weight == 0, zero) and zero.float().mean() == 0.5
        assert not torch.equal(layer.weight, old)
    assert not torch.equal(layers[-1].weight, weights_before[-1])


def test_dense_model_has_no_sparsity_masks():
    model, _ = classifier()
    assert keep_zeros(model.module) is None
    weight = model.module.bert.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        # Fewer than one in twenty zeros: not caused by pruning.
        weight.view(-1)[: weight.numel() // 25] = 0
    assert keep_zeros(model.module) is None


def test_dropout_is_overridden_in_training_and_restored():
    model, examples = classifier()
    layers = [part for part in model.module.modules() if isinstance(part, nn.Dropout)]
    own_dropouts = [layer.p for layer in layers]
    assert set(own_dropouts) == {0.1}
    seen = set()

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.update(layer.p for layer in layers)
        assert module.training
        return task_loss(module, batch)

    train(Trainee(model.module, examples, loss), FAST.model_copy(update={"dropout": 0.3}), 0, SilentProgress(), "test")
    assert seen == {0.3} and [layer.p for layer in layers] == own_dropouts


def test_dropout_is_restored_after_a_failure():
    model, examples = classifier()
    with pytest.raises(StageError):
        train(
            Trainee(model.module, examples, lambda module, batch: forward(module, batch).logits.sum() * float("nan")),
            FAST.model_copy(update={"dropout": 0.0}),
            0,
            SilentProgress(),
            "test",
        )
    assert {part.p for part in model.module.modules() if isinstance(part, nn.Dropout)} == {0.1}


def test_forward_pass_without_dropout_equals_eval_mode():
    # Attention has a dropout of its own in BERT; the override must reach it too.
    model, examples = classifier()
    gaps = []

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        answers = forward(module, batch).logits
        module.eval()
        gaps.append((forward(module, batch).logits - answers).abs().max().item())
        module.train()
        return answers.sum()

    for dropout in (0.0, None):
        config = FAST.model_copy(update={"dropout": dropout, "epochs": 0.2})
        train(Trainee(model.module, examples, loss), config, 0, SilentProgress(), "test")
    assert gaps[0] < 1e-5 and gaps[-1] > 1e-3


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_embeddings_are_unchanged(freeze: bool):
    model, examples = classifier()
    table = model.module.get_input_embeddings().weight
    table_before = table.detach().clone()
    trainee = Trainee(model.module, examples, task_loss, freeze_embeddings=freeze)
    train(trainee, FAST, 0, SilentProgress(), "test")
    assert torch.equal(table, table_before) is freeze and table.requires_grad
    assert not same(model.module.state_dict(), tiny.encoder().module.state_dict())


def test_bf16_autocast_is_used_when_requested():
    seen = set()

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        answers = forward(module, batch).logits
        seen.add(answers.dtype)
        return answers.float().sum()

    for precision in ("bf16", "fp32"):
        config = FAST.model_copy(update={"precision": precision, "epochs": 0.2})
        assert uses_bf16(precision) is (precision == "bf16")
        model, examples = classifier()
        train(Trainee(model.module, examples, loss), config, 0, SilentProgress(), "test")
        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert seen == {torch.bfloat16, torch.float32}


def test_predictions_keep_the_order_of_examples():
    model, examples = classifier()
    predictions = predict(model.module, examples, batch_size=5)
    assert predictions.shape == (64, 2) and predictions.dtype == np.float32
    for row in (0, 17, 63):
        batch = tensors(examples, [row])
        with torch.no_grad():
            alone = forward(model.module, batch).logits[0].numpy()
        np.testing.assert_allclose(predictions[row], alone, atol=1e-5)
    assert Counter(map(tuple, predictions.round(4).tolist())).most_common(1)[0][1] < 8
