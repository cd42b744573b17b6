"""The losses on representations against each example by itself, without padding, through transformers' own outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch

from compress.models.model import TorchModel
from compress.models.transformer_pruning import keep_layers
from compress.stages.distill.trainer import _Comparison
from compress.tasks.inference import forward

SIZE = tiny.WIDTH // tiny.HEADS
TEXTS = ["great", "the film was a boring and clumsy plot", "lovely music"]


@dataclass
class Seen:
    """What one unpadded text looks like inside a model: [length, width] each, and [heads, length, length]."""

    hidden: list[torch.Tensor]
    scores: list[torch.Tensor]
    values: list[torch.Tensor]


@torch.no_grad()
def look(model: TorchModel, text: str) -> Seen:
    batch = model.processor(text, return_tensors="pt", return_token_type_ids=False)
    hidden = [states[0] for states in model.module.eval()(**batch, output_hidden_states=True).hidden_states]
    seen = Seen(hidden, [], [])
    for states, layer in zip(hidden[:-1], model.module.base_model.encoder.layer, strict=True):
        attention = layer.attention.self
        query, key, value = (_heads(part(states)) for part in (attention.query, attention.key, attention.value))
        seen.scores.append(torch.einsum("hqd,hkd->hqk", query, key) / math.sqrt(SIZE))
        seen.values.append(torch.einsum("hqd,hkd->hqk", value, value) / math.sqrt(SIZE))
    return seen


def _heads(states: torch.Tensor) -> torch.Tensor:
    return torch.stack(states.split(SIZE, dim=-1))


def loss(method: str, teacher: TorchModel, student: TorchModel) -> float:
    """The loss of one padded batch of all texts; projections between equal widths are set to the identity."""
    comparison = _Comparison.between(method, teacher.module, student.module)
    for projection in comparison.projections:
        torch.nn.init.eye_(projection.weight)
    batch: dict[str, Any] = dict(
        teacher.processor(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    )
    with torch.no_grad(), comparison.listening():
        answers = forward(teacher.module.eval(), batch, **comparison.options)
        outputs = forward(student.module.eval(), batch, **comparison.options)
        found = comparison.loss(outputs, answers, batch["attention_mask"].float())
    return found.item()


def pair(layers: int = 3, kept: tuple[int, ...] = (0,)) -> tuple[TorchModel, TorchModel]:
    """A teacher, and a student of other weights with fewer layers."""
    student = tiny.encoder(seed=2, num_hidden_layers=layers)
    keep_layers(student.module, kept)
    return tiny.encoder(seed=1, num_hidden_layers=layers), student


def mean(parts: list[torch.Tensor]) -> float:
    return torch.cat([part.flatten() for part in parts]).mean().item()


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each head and query, [heads, length]."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(("layers", "kept", "taught_by"), [(3, (0,), [3]), (4, (0, 2), [2, 4]), (2, (0, 1), [1, 2])])
def test_tinybert_compares_embeddings_hidden_states_and_scores(
    layers: int, kept: tuple[int, ...], taught_by: list[int]
):
    teacher, student = pair(layers, kept)
    seen = [(look(teacher, text), look(student, text)) for text in TEXTS]
    expected = 0.0
    for mine, theirs in zip((0, *range(1, len(kept) + 1)), (0, *taught_by), strict=True):
        expected += mean([(t.hidden[theirs] - s.hidden[mine]).square() for t, s in seen])
        if mine:
            expected += mean([(t.scores[theirs - 1] - s.scores[mine - 1]).square() for t, s in seen])
    assert loss("tinybert", teacher, student) == pytest.approx(expected, rel=1e-4)


def test_minilm_compares_the_last_layers_attention_and_values():
    teacher, student = pair()
    seen = [(look(teacher, text), look(student, text)) for text in TEXTS]
    expected = mean([divergence(s.scores[-1], t.scores[-1]) for t, s in seen])
    expected += mean([divergence(s.values[-1], t.values[-1]) for t, s in seen])
    assert loss("minilm", teacher, student) == pytest.approx(expected, rel=1e-4)


def test_distilbert_compares_the_last_hidden_states():
    teacher, student = pair()
    seen = [(look(teacher, text), look(student, text)) for text in TEXTS]
    cosines = [torch.cosine_similarity(s.hidden[-1], t.hidden[-1], dim=-1) for t, s in seen]
    assert loss("distilbert", teacher, student) == pytest.approx(1 - mean(cosines), rel=1e-4)


@pytest.mark.parametrize("method", ["distilbert", "tinybert", "minilm"])
def test_a_model_does_not_differ_from_itself(method: str):
    assert loss(method, tiny.encoder(), tiny.encoder()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("method", "count"), [("distilbert", 1), ("tinybert", tiny.LAYERS + 1), ("minilm", 0)])
def test_projections_lead_from_the_students_width_to_the_teachers(method: str, count: int):
    comparison = _Comparison.between(method, tiny.encoder().module, tiny.encoder(hidden_size=16).module)
    assert [tuple(parameter.shape) for parameter in comparison.parameters()] == [(tiny.WIDTH, 16)] * count
    same_width = _Comparison.between(method, tiny.encoder().module, tiny.encoder().module)
    assert len(same_width.parameters()) == (tiny.LAYERS + 1 if method == "tinybert" else 0)
