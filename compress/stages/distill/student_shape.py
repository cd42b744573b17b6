"""Shape of a student model, computed from its teacher's shape and the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.stages.cost_model import PlanContext, Shape
from compress.stages.distill.settings import Student

_SIZES = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers"}
_SIZELESS = re.compile(r"dropout|hidden_act|initializer|num_attention_heads|label|eps|pad_token_id")


def spread_layers(layers: int, count: int) -> list[int]:
    """Return ``count`` of ``layers`` indices, evenly spread, including the last: 6 and 3 give 1, 3, 5."""
    return [(place + 1) * layers // count - 1 for place in range(count)]


def reconfigured(shape: Shape, changes: Mapping[str, Any]) -> Shape | None:
    """Return the shape after changes to the config, or None if their effect is unknown.

    Each sort is scaled as its matrices are: hidden^2 for attention, hidden x intermediate for feed-forward.
    """
    known = all(name in _SIZES or _SIZELESS.search(name) for name in changes)
    sized = {_SIZES[name]: value for name, value in changes.items() if name in _SIZES}
    if not known or not all(isinstance(value, int) and value > 0 for value in sized.values()):
        return None
    if not (shape.hidden and shape.intermediate and shape.layers):
        return None
    wide = replace(shape, **sized)
    hidden, middle = wide.hidden / shape.hidden, wide.intermediate / shape.intermediate
    layers = wide.layers / shape.layers
    return replace(
        wide,
        embeddings=shape.embeddings * hidden,
        attention=shape.attention * layers * hidden**2,
        feed_forward=shape.feed_forward * layers * hidden * middle,
        other=shape.other * hidden**2,
    )


def student_shape(student: Student | None, before: Shape | None, plan: PlanContext) -> Shape | None:
    """Return the shape of the student, or None if it is unknown; ``before`` is the shape of the stage's input."""
    if student is not None and student.model is not None:
        return plan.find_model(student.model, student.random_weights)
    if student is None or before is None:
        return before
    if student.layers is not None:
        return before.with_layers(len(student.layers))
    return reconfigured(before, student.config or {})


def student_layer_choices(student: Student | None, before: Shape | None) -> dict[str, tuple[Any, ...]]:
    """Return layers that a search should try for a student that keeps some: all, a half, a third, evenly spread."""
    if student is None or student.layers is None or before is None or before.layers < 2:
        return {}
    counts = dict.fromkeys(max(before.layers // part, 1) for part in (1, 2, 3))
    return {"student.layers": tuple(spread_layers(before.layers, count) for count in counts)}
