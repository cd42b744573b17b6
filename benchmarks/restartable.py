"""Training that goes on where it was killed and ends with the same bytes.

A `Lesson` is what is trained and its loss; `learn` runs it. Each step draws from a generator of its own. What a kill
must not lose (weights, the optimizer's moments, the moving average) is written each minute to one safetensors file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.plugins.diffusion.pipeline_model import import_diffusers
from compress.utils.progress import Progress

_SAVED_EVERY = 60.0
_NOTES = 20
_WARM_UP = 0.05
_DECAY = 0.999
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Lesson:
    """One training: ``loss`` of a batch that it draws from the generator it is given.

    With ``averaged`` the weights at the end are the moving average of all steps' (Ho et al. 2020, section 4).
    """

    name: str
    module: nn.Module
    loss: Callable[[torch.Generator], torch.Tensor]
    learning_rate: float
    averaged: bool = False


def learn(lesson: Lesson, steps: int, seed: int, folder: Path, progress: Progress) -> None:
    """AdamW with a warm-up and a decay along a cosine; goes on from ``folder`` where it was begun there.

    The weights are left as they are after the last step, or as their average, in evaluation mode.
    """
    state = _State(lesson, folder)
    start = state.load()
    if start:
        progress.note(f"{lesson.name}: goes on after step {start:,} of {steps:,}")
    lesson.module.train()
    saved, total, every = time.monotonic(), 0.0, max(steps // _NOTES, 1)
    for step in progress.track(range(start, steps), lesson.name, steps - start):
        loss = _step(lesson, state.optimizer, _rate(step, steps), seed, step)
        state.average.step(lesson.module.parameters())
        total += float(loss)
        if (step + 1) % every == 0:
            progress.note(f"{lesson.name}: step {step + 1:,} of {steps:,}, loss {total / every:.4f}")
            total = 0.0
        if time.monotonic() - saved > _SAVED_EVERY:
            state.save(step + 1)
            saved = time.monotonic()
    if start < steps:
        state.save(steps)
    if lesson.averaged:
        state.average.copy_to(lesson.module.parameters())
    lesson.module.eval()


def seconds_a_step(lesson: Lesson, seed: int, count: int = 4) -> float:
    """The median time of ``count`` steps after two that warm up; the weights are what they were before."""
    weights = {name: tensor.clone() for name, tensor in lesson.module.state_dict().items()}
    optimizer = _optimizer(lesson)
    lesson.module.train()
    times = []
    for step in range(count + 2):
        began = time.monotonic()
        _step(lesson, optimizer, 0.0, seed, step)
        times.append(time.monotonic() - began)
    lesson.module.load_state_dict(weights)
    return sorted(times[2:])[count // 2]


def _optimizer(lesson: Lesson) -> torch.optim.AdamW:
    return torch.optim.AdamW(lesson.module.parameters(), lesson.learning_rate, weight_decay=0.01)


def _step(lesson: Lesson, optimizer: torch.optim.AdamW, rate: float, seed: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed << 32) + step)
    torch.manual_seed((seed << 32) + step)
    optimizer.param_groups[0]["lr"] = rate * lesson.learning_rate
    loss = lesson.loss(generator)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(lesson.module.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def _rate(step: int, steps: int) -> float:
    warm = max(int(_WARM_UP * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def forget(lesson: Lesson, folder: Path) -> None:
    """Remove what only a training that goes on needs."""
    _file(lesson, folder).unlink(missing_ok=True)


def _file(lesson: Lesson, folder: Path) -> Path:
    return folder / f"{lesson.name}.safetensors"


class _State:
    """Everything that the next step depends on, in one file that is replaced whole."""

    def __init__(self, lesson: Lesson, folder: Path) -> None:
        self.lesson = lesson
        self.path = _file(lesson, folder)
        self.optimizer = _optimizer(lesson)
        self.average = import_diffusers().training_utils.EMAModel(
            lesson.module.parameters(), decay=_DECAY, use_ema_warmup=True
        )

    def load(self) -> int:
        """Take it from the file, and say how many steps it has seen: 0 without a file."""
        if not self.path.is_file():
            return 0
        tensors = load_file(self.path)
        step = int(tensors.pop("step"))
        parameters = dict(self.lesson.module.named_parameters())
        weights = {name: tensors[f"weights.{name}"] for name in self.lesson.module.state_dict()}
        self.lesson.module.load_state_dict(weights)
        for index, (name, parameter) in enumerate(parameters.items()):
            moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
            self.average.shadow_params[index] = tensors[f"average.{name}"]
        self.average.optimization_step = step
        return step

    def save(self, step: int) -> None:
        """Write it beside the file, then rename."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.lesson.module.state_dict().items()}
        for (name, parameter), shadow in zip(
            self.lesson.module.named_parameters(), self.average.shadow_params, strict=True
        ):
            tensors |= {f"{moment}.{name}": self.optimizer.state[parameter][moment] for moment in _MOMENTS}
            tensors[f"average.{name}"] = shadow
        tensors["step"] = torch.tensor(step)
        beside = self.path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        beside.replace(self.path)


def kept_plan(path: Path, make: Callable[[], dict[str, int]]) -> dict[str, int]:
    """The steps of each lesson, made once and kept: a training that goes on, or is done again, takes as many."""
    if not path.is_file():
        plan = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    stored_plan: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return stored_plan
