import dataclasses

import numpy as np
import pytest
import sentences
import torch

from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.numerics.embeddings import normalized
from compress.numerics.losses import embedding_distance
from compress.stages.distill.stage import Distill
from compress.tasks.inference import predict
from compress.utils.errors import StageError

MODULES = SentenceModules(sentences.WIDTH, steps=(Normalize(),))


def test_the_distance_of_unit_vectors_is_two_less_twice_their_cosine() -> None:
    first, other = (normalized(np.random.default_rng(seed).normal(size=(5, 7))) for seed in (0, 1))
    cosines = (first * other).sum(axis=1)
    distance = embedding_distance(torch.from_numpy(first), torch.from_numpy(other))
    assert float(distance) == pytest.approx(2 - 2 * cosines.mean())


@pytest.mark.parametrize("method", ["logits", "distilbert"])
def test_a_student_of_one_layer_comes_nearer_to_its_teacher(method: str) -> None:
    context = sentences.context(sentences.dataset(train=64, validation=16))
    teacher = sentences.encoder(MODULES)
    examples = context.encode("test", teacher)
    taught = predict(teacher.module, examples)
    options = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "precision": "fp32", "method": method}
    untrained = Distill(student={"layers": [1]}, **{**options, "learning_rate": 1e-12}).run(teacher, context)
    student = Distill(student={"layers": [1]}, **options).run(sentences.encoder(MODULES), context)
    cosine_before, after = (
        (predict(encoder.module, examples) * taught).sum(axis=1).mean() for encoder in (untrained, student)
    )
    assert after > cosine_before + 0.1
    assert after > 0.8


def test_another_number_of_dimensions_is_refused() -> None:
    teacher, student = (
        sentences.encoder(MODULES),
        sentences.encoder(MODULES.followed_by(Dense(np.eye(4, 32, dtype="f")))),
    )
    context = dataclasses.replace(sentences.context(), earlier=lambda label: teacher)
    with pytest.raises(StageError, match="answers with 4 numbers and the teacher with 32"):
        Distill(teacher="start", epochs=1, batch_size=16).run(student, context)
