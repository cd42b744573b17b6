"""Which app is made of a task."""

from __future__ import annotations

import pytest

from compress.plugins.apps import app_types
from compress.tasks import registry
from compress.tasks.text_classification import TextClassification
from compress.utils.errors import InputError


class Sentiment(TextClassification):
    name = "sentiment"


def test_an_app_is_chosen_by_the_preprocessing_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TASKS", {**registry.TASKS, "sentiment": Sentiment()})
    assert app_types.kind_of("sentiment") is app_types.kind_of("text-classification")
    monkeypatch.setattr(Sentiment, "app_steps", None)
    with pytest.raises(InputError, match="no app for a model of sentiment"):
        app_types.kind_of("sentiment")
