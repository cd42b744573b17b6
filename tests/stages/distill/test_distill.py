"""Tests of `distill`: agreement of students with their teacher, loss parts, and refused combinations."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentences
import tiny
import torch
from pydantic import ValidationError

from compress.models.model import TorchModel
from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.models.transformer_pruning import keep_heads
from compress.numerics.embeddings import normalized
from compress.numerics.losses import embedding_distance
from compress.stages.base import Context
from compress.stages.distill.settings import Student
from compress.stages.distill.stage import Distill
from compress.stages.finetune import Finetune
from compress.stages.sparsify.magnitude import sparse_layers
from compress.tasks.inference import predict
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

METHODS = ("logits", "distilbert", "tinybert", "minilm")
SIZES = {"batch_size": 16, "precision": "fp32", "dropout": 0.0, "keep_best": False}
LEARN = {**SIZES, "epochs": 8, "learning_rate": 3e-3}
STILL = {**SIZES, "epochs": 1, "learning_rate": 1e-12, "optimizer": {"weight_decay": 0}}


class Losses(SilentProgress):
    """A progress that collects the loss of each epoch from the notes."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def note(self, message: str) -> None:
        match = re.search(r"loss (-?[0-9.]+)", message)
        self.seen += [float(match[1])] if match else []


@cache
def _teacher() -> TorchModel:
    stage = Finetune(**SIZES, epochs=20, learning_rate=3e-3)
    return stage.run(tiny.encoder(seed=3), tiny.context(tiny.dataset(128)))


def teacher() -> TorchModel:
    """Return a copy of a teacher trained on the toy task."""
    return copy.deepcopy(_teacher())


def context(data: Any = None, **changes: Any) -> tuple[Context, Losses]:
    losses = Losses()
    stage_context = tiny.context(data or tiny.dataset(256, unlabeled=32), earlier=lambda label: teacher(), **changes)
    return Context(**{**vars(stage_context), "progress": losses}), losses


def answers(model: TorchModel) -> np.ndarray:
    given, _ = context()
    return predict(model.module, given.encode("test", model))


def agreement(model: TorchModel, other: TorchModel) -> float:
    return float((answers(model).argmax(1) == answers(other).argmax(1)).mean())


def divergence(model: TorchModel, other: TorchModel) -> float:
    mine, theirs = (torch.from_numpy(answers(classifier)).log_softmax(dim=-1) for classifier in (model, other))
    return float((theirs.exp() * (theirs - mine)).sum(dim=-1).mean())


def test_student_learns_to_agree_with_its_teacher():
    given, losses = context()
    stage = Distill(**LEARN, teacher="finetune")
    untrained = tiny.encoder(seed=8)
    first = divergence(untrained, teacher())
    student = stage.run(tiny.encoder(seed=8), given)
    assert agreement(student, teacher()) >= 0.9 > agreement(untrained, teacher())
    assert divergence(student, teacher()) < first / 3
    assert len(losses.seen) == 8 and losses.seen[-1] < losses.seen[0] / 2


def test_copy_of_the_teacher_has_zero_loss():
    # The rate is next to nothing, so the noted loss is that of the copy: zero, padded batches or not.
    given, losses = context()
    Distill(**STILL, teacher="finetune").run(teacher(), given)
    assert losses.seen == pytest.approx([0.0], abs=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    parts = []
    for labels_weight in (0, 1, 3):
        given, losses = context()
        Distill(**STILL, teacher="finetune", labels_weight=labels_weight).run(tiny.encoder(seed=8), given)
        parts += losses.seen
    assert 0.05 < parts[0] < parts[1] - 0.05
    assert parts[2] == pytest.approx(parts[0] + 3 * (parts[1] - parts[0]), abs=1e-3)


def test_logit_loss_equals_divergence_of_predictions():
    given, losses = context(tiny.dataset(96))
    Distill(**STILL, teacher="finetune", temperature=3.0).run(tiny.encoder(seed=8), given)
    examples = given.encode("train", teacher())
    mine, theirs = (
        (torch.from_numpy(predict(model.module, examples)) / 3).log_softmax(-1)
        for model in (tiny.encoder(seed=8), teacher())
    )
    expected = 9 * float((theirs.exp() * (theirs - mine)).sum(-1).mean())
    assert losses.seen == pytest.approx([expected], abs=1e-4)


def test_a_narrower_student_learns(tmp_path: Path):
    given, losses = context()
    change = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    stage = Distill(**{**LEARN, "epochs": 12}, student={"config": change})
    student = stage.run(teacher(), given)
    config = student.module.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 20, 1)
    assert student.module.bert.embeddings.word_embeddings.weight.shape == (len(student.processor), 16)
    assert student.labels() == tiny.LABELS
    assert agreement(student, teacher()) >= 0.85 and losses.seen[-1] < losses.seen[0] / 2
    student.save(tmp_path)
    np.testing.assert_allclose(answers(TorchModel.load(tmp_path, TASKS[tiny.TASK])), answers(student), atol=1e-6)


def test_student_of_selected_layers_starts_from_their_weights():
    given, _ = context()
    student = Distill(**STILL, student={"layers": [1]}).run(teacher(), given)
    assert student.module.config.num_hidden_layers == 1
    expected_weights = teacher().module.bert.encoder.layer[1].state_dict()
    for name, tensor in student.module.bert.encoder.layer[0].state_dict().items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-8)


def test_student_of_another_config_is_initialized_from_the_seed():
    students = []
    for seed in (0, 0, 1):
        given, _ = context(seed=seed)
        students.append(Distill(**STILL, student={"config": {"hidden_size": 16}}).run(teacher(), given))
    tables = [student.module.bert.embeddings.word_embeddings.weight for student in students]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_input_model_is_unchanged_when_student_is_another():
    model, given = teacher(), context()[0]
    Distill(**LEARN, student={"layers": [0]}).run(model, given)
    assert all(
        torch.equal(tensor, _teacher().module.state_dict()[name]) for name, tensor in model.module.state_dict().items()
    )


def test_unlabeled_text_is_used_for_training():
    sizes = []
    for use in (False, True):
        given, _ = context()
        steps: list[int] = []
        given.progress.track = lambda items, description, total, steps=steps: (steps.append(total), items)[1]  # type: ignore[method-assign]
        Distill(**STILL, teacher="finetune", use_unlabeled=use, labels_weight=1.0).run(tiny.encoder(seed=8), given)
        sizes += steps
    # The teacher predicts in batches of 64, and the student trains in batches of 16.
    assert sizes == [256 // 64, 256 // 16, -(-(256 + 32) // 64), (256 + 32) // 16]


def test_texts_with_replaced_words_are_used_for_training():
    seen: list[int] = []
    given, losses = context()
    losses.track = lambda items, description, total: (seen.append(total), items)[1]  # type: ignore[method-assign]
    Distill(**STILL, teacher="finetune", replace_words=64).run(tiny.encoder(seed=8), given)
    assert seen == [(256 + 64) // 64, (256 + 64) // 16]


def test_pruned_weights_stay_zero():
    model = tiny.encoder(seed=8)
    with torch.no_grad():
        for layer in list(sparse_layers(model.module).values())[:-1]:
            layer.weight[:, ::2] = 0
    given, _ = context()
    student = Distill(**LEARN, teacher="finetune").run(model, given)
    for layer in list(sparse_layers(student.module).values())[:-1]:
        assert float((layer.weight == 0).float().mean()) == 0.5


def saved(model: TorchModel, folder: Path) -> str:
    folder.mkdir()
    model.save(folder)
    return str(folder)


def test_a_student_with_its_own_tokenizer_learns_logits(tmp_path: Path):
    student_folder = saved(tiny.encoder("distilbert", seed=8, processor=tiny.unigram()), tmp_path / "student")
    given, _ = context()
    student = Distill(**LEARN, student={"model": student_folder}).run(teacher(), given)
    assert student.module.config.model_type == "distilbert" and agreement(student, teacher()) >= 0.85


def test_student_of_a_head_pruned_teacher_has_all_heads(tmp_path: Path):
    model = teacher()
    keep_heads(model.module, [[1], [0, 2]])
    student = Distill(**STILL, student={"config": {"hidden_size": 16}}).run(model, context()[0])
    student_folder = saved(student, tmp_path / "student")
    np.testing.assert_allclose(
        answers(TorchModel.load(Path(student_folder), TASKS[tiny.TASK])), answers(student), atol=1e-6
    )


def test_unknown_config_field_is_refused():
    with pytest.raises(StageError, match="'bert' model has no field 'hiden_size'"):
        Distill(**STILL, student={"config": {"hiden_size": 16}}).run(teacher(), context()[0])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 30},
        {"hidden_act": "gelou"},
        {"intermediate_size": -4},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
    ],
)
def test_invalid_student_config_is_refused(change: dict[str, Any]):
    with pytest.raises(StageError, match="config does not make a model"):
        Distill(**STILL, student={"config": change}).run(teacher(), context()[0])


def test_missing_layers_are_refused():
    with pytest.raises(StageError, match=re.escape("Layers [0, 5] cannot be kept")):
        Distill(**STILL, student={"layers": [0, 5]}).run(teacher(), context()[0])


@pytest.mark.parametrize(
    "parameters", [{}, {"student": {}}, {"student": {"layers": [0], "model": "x"}}, {"student": {"layers": []}}]
)
def test_parameters_without_distinct_teacher_are_refused(parameters: dict[str, Any]):
    with pytest.raises(ValidationError):
        Distill(**parameters)


def test_random_weights_need_an_architecture() -> None:
    with pytest.raises(ValidationError, match=r"model, whose config\.json describes"):
        Student(layers=(0,), random_weights=True)
    assert Student(model="a/b", random_weights=True).random_weights


MODULES = SentenceModules(sentences.WIDTH, steps=(Normalize(),))


def test_squared_distance_of_unit_vectors_is_2_minus_2_cosine() -> None:
    first, other = (normalized(np.random.default_rng(seed).normal(size=(5, 7))) for seed in (0, 1))
    cosines = (first * other).sum(axis=1)
    distance = embedding_distance(torch.from_numpy(first), torch.from_numpy(other))
    assert float(distance) == pytest.approx(2 - 2 * cosines.mean())


def test_one_layer_student_approaches_its_teacher() -> None:
    context = sentences.context(sentences.dataset(train=64, validation=16))
    teacher = sentences.encoder(MODULES)
    examples = context.encode("test", teacher)
    taught = predict(teacher.module, examples)
    options = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "precision": "fp32"}
    untrained = Distill(student={"layers": [1]}, **{**options, "learning_rate": 1e-12}).run(teacher, context)
    student = Distill(student={"layers": [1]}, **options).run(sentences.encoder(MODULES), context)
    cosine_before, after = (
        (predict(encoder.module, examples) * taught).sum(axis=1).mean() for encoder in (untrained, student)
    )
    assert after > cosine_before + 0.1
    assert after > 0.8


@pytest.mark.parametrize("origin", ["config", "model"])
def test_student_of_another_width_embeds_into_the_space_of_its_teacher(origin: str, tmp_path: Path) -> None:
    context = sentences.context(sentences.dataset(train=64, validation=16))
    teacher, narrow = sentences.encoder(MODULES), {"hidden_size": 16, "intermediate_size": 32}
    if origin == "config":
        student_of: dict[str, Any] = {"config": narrow}
    else:
        sentences.encoder(SentenceModules(16, steps=(Normalize(),)), seed=5, **narrow).save(tmp_path / "narrow")
        student_of = {"model": str(tmp_path / "narrow")}
    taught = predict(teacher.module, context.encode("test", teacher))
    options = {"epochs": 30, "batch_size": 16, "learning_rate": 5e-3, "precision": "fp32"}
    student = Distill(student=student_of, **options).run(teacher, context)

    assert teacher.processor.modules.steps == MODULES.steps, "the teacher's own layers are unchanged"
    projection, last = student.processor.modules.steps
    assert isinstance(projection, Dense) and projection.weight.shape == (32, 16) and isinstance(last, Normalize)
    answered = predict(student.module, context.encode("test", student))
    assert float((answered * taught).sum(axis=1).mean()) > 0.7
    # The projection has learned: random weights of the same size do not bring the embeddings near the teacher's.
    random = dataclasses.replace(projection, weight=np.random.default_rng(0).normal(0, 0.2, (32, 16)).astype("f"))
    untrained = copy.deepcopy(student)
    untrained.processor.modules = dataclasses.replace(student.processor.modules, steps=(random, last))
    answered = predict(untrained.module, context.encode("test", untrained))
    assert float((answered * taught).sum(axis=1).mean()) < 0.4
    # Saved files hold what was trained, and nothing else.
    student.save(tmp_path / "student")
    assert not any(name.startswith("dense") for name in student.module.state_dict())
    loaded = TASKS[sentences.TASK].load(tmp_path / "student", None, False)
    np.testing.assert_allclose(
        predict(loaded.module, context.encode("test", loaded)),
        predict(student.module, context.encode("test", student)),
        atol=1e-6,
    )


def test_linear_layer_of_a_student_is_trained() -> None:
    context, layer = sentences.context(), Dense(np.eye(32, dtype="f"), np.zeros(32, "f"), "tanh")
    teacher, student = sentences.encoder(MODULES), sentences.encoder(MODULES.followed_by(layer))
    context = dataclasses.replace(context, earlier=lambda label: teacher)
    trained = Distill(teacher="start", epochs=1, batch_size=16, learning_rate=1e-3).run(student, context)
    dense = trained.processor.modules.steps[0]
    assert np.abs(dense.weight - layer.weight).max() > 1e-4
    assert np.abs(dense.bias).max() > 1e-4 and dense.activation == "tanh"


def test_mismatched_embedding_dimension_is_refused() -> None:
    teacher, student = (
        sentences.encoder(MODULES),
        sentences.encoder(MODULES.followed_by(Dense(np.eye(4, 32, dtype="f")))),
    )
    context = dataclasses.replace(sentences.context(), earlier=lambda label: teacher)
    with pytest.raises(StageError, match="has 4 outputs and the teacher 32"):
        Distill(teacher="start", epochs=1, batch_size=16).run(student, context)
