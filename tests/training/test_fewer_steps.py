"""Denoisers that learn to draw in fewer steps: against an exact teacher, and as a stage of tiny pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mixture
import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import nn

from compress.checkpoints.schedulers import best_untrained
from compress.errors import StageError
from compress.numerics.diffusion import NoiseTable
from compress.training.distillation_config import Distillation
from compress.training.fewer_steps import StepsLesson, told_of_guidance
from compress.training.fewer_steps_config import FewerSteps
from compress.training.noised_latents import latent_examples
from compress.training.step_losses import Agree, Averaged, Batch, Denoiser, Halve

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def lesson(folder: Path, student: nn.Module, few: dict[str, Any], rows: int = 8192, **settings: Any) -> StepsLesson:
    told = Distillation.model_validate(
        {"fewer_steps": few, "batch_size": 256, "precision": "fp32", "weight_decay": 0.0, **settings}
    )
    assert told.fewer_steps is not None
    examples = latent_examples(mixture.points(rows), {})
    about = replace(tiny.context(), scratch=folder)
    return StepsLesson(
        told, told.fewer_steps, mixture.ExactDenoiser(), student, mixture.scheduler(), examples, None, about
    )


def energy(one: torch.Tensor, other: torch.Tensor) -> float:
    """The energy distance of two sets of points (Szekely and Rizzo 2013): 0 for the same distribution."""
    within = torch.cdist(one, one).mean() + torch.cdist(other, other).mean()
    return float(2 * torch.cdist(one, other).mean() - within)


def noise(count: int = 1500) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(5))


def best_energy(steps: int, real: torch.Tensor) -> float:
    """Of all schedulers, with the exact denoiser."""
    exact = mixture.ExactDenoiser()
    _, tried = best_untrained(
        mixture.scheduler(), steps, lambda made: energy(mixture.drawn(exact, made, steps, noise()), real)
    )
    assert tried[0].error is not None
    return tried[0].error
