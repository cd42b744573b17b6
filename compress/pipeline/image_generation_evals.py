"""Evaluations of models that generate images, by the plug-in that supports them. Other models have none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.data.membership import Part
from compress.models.image_generation import image_generation_hook
from compress.pipeline.target_session import TargetSession
from compress.results.measurement import Measurement
from compress.results.report import DriftRecord, PictureRecord
from compress.tasks.capability import GENERATES_IMAGES


def judgements(session: TargetSession, parts: Sequence[Part]) -> list[Measurement]:
    """Return the metrics that the recipe's judge computes from each model's images, on all rows and each slice."""
    return _evaluate("judgements", session, parts)


def sampling_steps(session: TargetSession) -> list[Measurement]:
    """Return the number of sampling steps of each model."""
    return _evaluate("sampling_steps", session)


def image_grid(session: TargetSession) -> list[PictureRecord]:
    """Return the first images of each model, with their difference from the baseline's images."""
    return _evaluate("image_grid", session)


def sampling_drifts(session: TargetSession) -> list[DriftRecord]:
    """Return how far each model's latents drift from the baseline's, over the images of the grid."""
    return _evaluate("sampling_drifts", session)


def _evaluate(hook: str, session: TargetSession, *arguments: Any) -> list[Any]:
    if GENERATES_IMAGES not in session.runner.inputs.task.capabilities:
        return []
    results: list[Any] = image_generation_hook(hook)(session, *arguments)
    return results
