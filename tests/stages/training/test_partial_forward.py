"""A forward pass that leaves frozen layers and needless tokens out gives what the whole one gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import nn

from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.protocols import fields_without_effect
from compress.stages.training import partial_forward as subject
from compress.stages.training.loop import Trainee, train
from compress.stages.training.partial_forward import FrozenLayers, shortened
from compress.stages.training.settings import Training
from compress.tasks.capability import EMBEDS, HAS_CLASSES, TAKES_IMAGES
from compress.tasks.inference import forward, predict, tensors
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

PLAIN = Training(epochs=1, learning_rate=1e-3, batch_size=8, precision="fp32", dropout=0)
LAYERS = 3


def deep(architecture: str = "bert") -> Any:
    name = "n_layers" if architecture == "distilbert" else "num_hidden_layers"
    return tiny.encoder(architecture, **{name: LAYERS})


def task_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(forward(module, batch).logits, batch["labels"])


def gradients(module: nn.Module, batch: dict[str, torch.Tensor], **shortcut: Any) -> dict[str, torch.Tensor]:
    module.zero_grad()
    with shortened(module, **shortcut):  # type: ignore[arg-type]
        loss = task_loss(module, batch)
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def kept(module: Any, examples: Any, count: int) -> FrozenLayers:
    frozen = FrozenLayers(module, count)
    frozen.keep_states(examples, False, SilentProgress(), "test")
    return frozen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_the_first_token_is_all_that_these_classifiers_read(architecture: str, attention: str) -> None:
    model = deep(architecture)
    model.module.config._attn_implementation = attention
    examples = tiny.context().encode("train", model)
    batch = tensors(examples, list(range(16)))
    assert not batch["attention_mask"].all(), "some are padded"
    whole, expected_gradients = forward(model.module, batch).logits, gradients(model.module, batch)
    with shortened(model.module, first_token=True):
        torch.testing.assert_close(forward(model.module, batch).logits, whole, atol=1e-5, rtol=1e-5)
    first_token_gradients = gradients(model.module, batch, first_token=True)
    assert first_token_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(first_token_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(forward(model.module, batch).logits, whole), "the layers are back"


def test_the_last_layer_gives_one_token() -> None:
    model = deep()
    batch = tensors(tiny.context().encode("train", model), [0, 1, 2])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with shortened(model.module, first_token=True):
        assert model.module.base_model(**inputs).last_hidden_state.shape == (3, 1, tiny.WIDTH)


def test_dropout_of_the_attention_stays() -> None:
    model = deep()
    model.module.train()
    for layer in model.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model.module.base_model.encoder.layer[-1].attention.self.dropout.p = 0.5
    batch = tensors(tiny.context().encode("train", model), [0, 1, 2])
    with shortened(model.module, first_token=True):
        assert not torch.equal(forward(model.module, batch).logits, forward(model.module, batch).logits)
    model.module.eval()
    with shortened(model.module, first_token=True):
        assert torch.equal(forward(model.module, batch).logits, forward(model.module, batch).logits)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("count", [1, 2])
def test_kept_states_stand_for_the_frozen_layers(architecture: str, count: int) -> None:
    model = deep(architecture)
    examples = tiny.context().encode("train", model)
    batch = tensors(examples, [5, 40, 2, 63])
    whole = forward(model.module, batch).logits
    frozen = kept(model.module, examples, count)
    seen = []
    hook = model.module.base_model.get_submodule(
        "transformer.layer.0" if architecture == "distilbert" else "encoder.layer.0"
    ).register_forward_hook(lambda *_: seen.append(1))
    with shortened(model.module, frozen):
        frozen.choose([5, 40, 2, 63])
        torch.testing.assert_close(forward(model.module, batch).logits, whole, atol=1e-5, rtol=1e-5)
    hook.remove()
    assert not seen, "the frozen layer isn't computed again"


def test_states_too_large_to_keep_are_computed_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "KEPT_STATES_BYTES", 0)
    model = deep()
    model.module.train()
    examples = tiny.context().encode("train", model)
    frozen = kept(model.module, examples, LAYERS - 1)
    batch = tensors(examples, [1, 2, 3])
    states = []
    model.module.base_model.encoder.layer[-1].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with shortened(model.module, frozen):
        for layer in model.module.base_model.embeddings.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        forward(model.module, batch)
        forward(model.module, batch)
    assert torch.equal(*states), "no dropout in what is frozen"
    assert not states[0].requires_grad


def test_frozen_layers_and_embeddings_keep_their_bits_and_the_rest_learns_as_without_the_shortcut() -> None:
    shortcut, plain = deep(), deep()
    states_before = copy.deepcopy(shortcut.module.state_dict())
    examples = tiny.context().encode("train", shortcut)
    trainee = Trainee(shortcut.module, examples, task_loss, frozen_layers=1, first_token_only=True)
    losses = train(trainee, PLAIN, 0, SilentProgress(), "test")
    for part in (plain.module.base_model.embeddings, plain.module.base_model.encoder.layer[0]):
        part.requires_grad_(False)
    expected = train(Trainee(plain.module, examples, task_loss), PLAIN, 0, SilentProgress(), "test")
    assert losses == pytest.approx(expected, abs=1e-4)
    after, expected_states = shortcut.module.state_dict(), plain.module.state_dict()
    for name, tensor in after.items():
        frozen = ".embeddings." in name or ".layer.0." in name
        assert torch.equal(tensor, states_before[name]) is frozen, name
        if not name.endswith("key.bias"):  # it moves no softmax: its gradient is rounding, which Adam scales up
            torch.testing.assert_close(tensor, expected_states[name], atol=2e-4, rtol=1e-3, msg=name)
    assert all(parameter.requires_grad for parameter in shortcut.module.parameters())


def test_a_seed_gives_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = deep()
        trainee = Trainee(
            model.module, tiny.context().encode("train", model), task_loss, frozen_layers=1, first_token_only=True
        )
        train(trainee, PLAIN.model_copy(update={"dropout": 0.1}), 0, SilentProgress(), "test")
        states.append(model.module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_stages_pass_their_fields_on() -> None:
    model, context = deep(), tiny.context()
    states_before = copy.deepcopy(model.module.state_dict())
    fields = {"learning_rate": 1e-3, "precision": "fp32", "dropout": 0, "first_token_only": True}
    Finetune(frozen_layers=2, epochs=1, **fields).run(model, context)  # type: ignore[arg-type]
    changed = {
        name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, states_before[name])
    }
    assert changed and not any(".layer.0." in name or ".layer.1." in name for name in changed)
    context = tiny.context(earlier=lambda label: copy.deepcopy(model))
    student = copy.deepcopy(model)
    short = Distill(teacher="finetune", student={"layers": [0]}, epochs=2, **fields).run(student, context)  # type: ignore[arg-type]
    fields["first_token_only"] = False
    whole = Distill(teacher="finetune", student={"layers": [0]}, epochs=2, **fields).run(student, context)  # type: ignore[arg-type]
    examples = context.encode("train", model)
    difference = abs(predict(short.module, examples) - predict(whole.module, examples)).max()
    assert 0 < difference < 0.05, "the same function, rounded otherwise"


def test_predictions_by_the_first_token_are_those_of_all() -> None:
    model = deep()
    examples = tiny.context().encode("train", model)
    whole = predict(model.module, examples)
    with shortened(model.module, first_token=True):
        short = predict(model.module, examples)
    assert abs(whole - short).max() < 1e-5


def test_what_cannot_be_shortened_is_refused() -> None:
    model = deep("distilbert")
    with (
        pytest.raises(StageError, match="classifier reads the first token alone"),
        shortened(model.module, first_token=True),
    ):
        pass
    with pytest.raises(StageError, match="Cannot freeze 3 of 3 layers"):
        FrozenLayers(model.module, LAYERS)
    with pytest.raises(ValidationError, match="no first_token_only"):
        Distill(student={"layers": [0]}, method="minilm", first_token_only=True)  # type: ignore[arg-type]


def test_the_layers_come_back_after_a_failure() -> None:
    model = deep()
    with pytest.raises(RuntimeError), shortened(model.module, first_token=True):
        raise RuntimeError
    assert len(model.module.base_model.encoder.layer) == LAYERS


def test_fields_are_named_where_they_mean_nothing() -> None:
    assert "first_token_only" in fields_without_effect(Finetune(first_token_only=True), frozenset({TAKES_IMAGES}))
    distill = Distill(teacher="start", first_token_only=True)
    assert "first_token_only" in fields_without_effect(distill, frozenset({EMBEDS}))
    assert not fields_without_effect(Finetune(first_token_only=True), frozenset({HAS_CLASSES}))
