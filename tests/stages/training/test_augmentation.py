"""Training images varied: what the model is shown, that it can be repeated, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_images
import torch
from pydantic import ValidationError
from torch import nn

from compress.models.model import TorchModel
from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.protocols import fields_without_effect
from compress.stages.qat.stage import Qat
from compress.stages.sparsify.stages import SparsifyGradually
from compress.stages.training.augmentation import Augmentation
from compress.stages.training.loop import Trainee, train
from compress.stages.training.settings import Augment, Training
from compress.tasks.inference import tensors
from compress.tasks.registry import get_task
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

BOTH = {"crop_padding": 1, "horizontal_flip": 0.5}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"}


def shown(augment: dict[str, Any] | None, seed: int = 0) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """What two epochs over 16 images show: places [2 x 16] and pixels [2 x 16, C, H, W], a batch at a time."""
    model = tiny_images.vit(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", model)
    places, pixels = [], []

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        places.append(batch["index"].numpy())
        pixels.append(batch["pixel_values"].clone())
        return sum(parameter.sum() for parameter in module.parameters()) * 0  # type: ignore[return-value]

    varied = None if augment is None else Augment.model_validate(augment)
    trainee = Trainee(model.module, examples, loss, augment=varied)
    train(trainee, Training.model_validate(QUICK), seed, SilentProgress(), "test")
    return places, pixels


def variants(image: np.ndarray, black: np.ndarray) -> list[np.ndarray]:
    """All that a padding of 1 and a flip can make of it, [18, C, H, W]."""
    padded = np.stack([np.pad(plane, 1, constant_values=value) for plane, value in zip(image, black, strict=True)])
    height, width = image.shape[1:]
    windows = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return windows + [window[:, :, ::-1] for window in windows]


def test_each_epoch_shows_other_variants_of_the_same_images():
    places, pixels = shown(BOTH)
    plain_places, plain = shown(None)
    assert all(map(np.array_equal, places, plain_places)), "the order of the examples is that of plain training"
    # Black is 0, and preparation takes 0.5 away and divides by 0.5.
    black = np.array([-1.0, -1.0, -1.0], np.float32)
    originals = {row: image.numpy() for row, image in zip(plain_places[0], plain[0], strict=True)}
    originals |= {row: image.numpy() for row, image in zip(plain_places[1], plain[1], strict=True)}
    taken: dict[int, list[int]] = {row: [] for row in range(16)}
    for row, image in zip(np.concatenate(places), torch.cat(pixels).numpy(), strict=True):
        matches = [i for i, variant in enumerate(variants(originals[row], black)) if np.array_equal(variant, image)]
        assert len(matches) == 1
        taken[row].append(matches[0])
    assert len({first for first, _ in taken.values()}) > 5, "images of one epoch are moved apart from each other"
    assert any(first != second for first, second in taken.values()), "epochs differ"


def test_the_same_batch_is_varied_by_seed_and_epoch_and_not_by_what_was_drawn_before():
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", tiny_images.vit())
    augmentation = Augmentation.of(Augment.model_validate(BOTH), examples, seed=0)
    batch = tensors(examples, list(range(16)))
    first, second, again = (augmentation.vary(batch, range(16), epoch)["pixel_values"] for epoch in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    other = Augmentation.of(Augment.model_validate(BOTH), examples, seed=1).vary(batch, range(16), 1)
    assert not torch.equal(first, other["pixel_values"])


def test_without_augment_images_are_shown_as_they_are():
    places, pixels = shown(None)
    model = tiny_images.vit()
    examples = tiny_images.context(tiny_images.dataset(train=16)).encode("train", model)
    for chosen, batch in zip(places, pixels, strict=True):
        assert np.array_equal(batch.numpy(), examples.batch(chosen.tolist())["pixel_values"])


def test_a_seed_gives_the_same_images_and_another_gives_others():
    _, once = shown(BOTH)
    _, twice = shown(BOTH)
    _, other = shown(BOTH, seed=1)
    assert torch.equal(torch.cat(once), torch.cat(twice))
    assert not torch.equal(torch.cat(once), torch.cat(other))


def test_finetune_gives_the_same_weights_each_time_and_others_than_without():
    def weights(augment: dict[str, Any] | None) -> torch.Tensor:
        model = tiny_images.vit()
        stage = Finetune.model_validate({**QUICK, "augment": augment})
        stage.run(model, tiny_images.context(tiny_images.dataset(train=16)))
        return torch.cat([parameter.detach().flatten() for parameter in model.module.parameters()])

    assert torch.equal(weights(BOTH), weights(BOTH))
    assert not torch.equal(weights(BOTH), weights(None))


def watched(model: TorchModel) -> list[tuple[bool, torch.Tensor]]:
    """Fills with what the module, or a copy of it, is given: whether it was training, and the pixels."""
    seen: list[tuple[bool, torch.Tensor]] = []

    def keep(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        seen.append((module.training, inputs["pixel_values"].clone()))

    model.module.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def test_a_teacher_answers_the_image_that_its_student_is_shown():
    student, teacher = tiny_images.vit(seed=0), tiny_images.vit(seed=1)
    learned, taught = watched(student), watched(teacher)
    context = replace(tiny_images.context(tiny_images.dataset(train=16)), earlier=lambda label: teacher)
    Distill.model_validate({**QUICK, "teacher": "start", "augment": BOTH}).run(student, context)
    assert len(taught) == 4 and not any(training for training, _ in taught)
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(learned, taught, strict=True))


def test_a_teacher_that_prepares_images_otherwise_is_refused():
    student, teacher = tiny_images.vit(), tiny_images.vit()
    teacher.processor = tiny_images.processor(image_mean=[0.4, 0.5, 0.5])
    context = replace(tiny_images.context(tiny_images.dataset(train=16)), earlier=lambda label: teacher)
    with pytest.raises(StageError, match="prepare images differently"):
        Distill.model_validate({**QUICK, "teacher": "start", "augment": BOTH}).run(student, context)


def test_text_is_refused_before_it_is_trained_on():
    model = tiny.encoder()
    weight_before = model.module.classifier.weight.detach().clone()
    with pytest.raises(StageError, match="varies images, and the training examples are none"):
        Finetune.model_validate({**QUICK, "augment": BOTH}).run(model, tiny.context())
    assert torch.equal(model.module.classifier.weight, weight_before)


def test_padding_as_wide_as_the_image_is_refused():
    assert shown({"crop_padding": tiny_images.SIDE - 1})
    with pytest.raises(StageError, match="crop_padding is 16, and images have 16 x 16 pixels"):
        shown({"crop_padding": tiny_images.SIDE})


def test_fields_that_ask_for_nothing_or_too_much_are_refused():
    for wrong in ({}, {"crop_padding": 0, "horizontal_flip": 0}, {"horizontal_flip": 1.0}, {"crop_padding": -1}):
        with pytest.raises(ValidationError):
            Augment.model_validate(wrong)


@pytest.mark.parametrize("kind", [Finetune, Distill, Qat, SparsifyGradually])
def test_a_recipe_of_texts_has_no_use_for_it(kind: type[Any]):
    more = {"teacher": "start"} if kind is Distill else {"sparsity": 0.5} if kind is SparsifyGradually else {}
    stage = kind.model_validate({**more, "augment": BOTH})
    assert "augment" in fields_without_effect(stage, get_task("text-classification").capabilities)
    assert "augment" not in fields_without_effect(stage, get_task("image-classification").capabilities)
