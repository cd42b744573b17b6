"""Training that can be resumed after a kill and gives the same bytes as an uninterrupted run.

A `Training` is a module and its loss; `train` runs it. Each step has its own random generator. Weights, optimizer state
and moving average are saved to one safetensors file every minute.
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
class Training:
    """A module and its loss.

    Attributes:
        name: Name of the checkpoint file.
        module: Module to train.
        loss: Function that samples a batch with a generator and returns its loss.
        learning_rate: Peak learning rate.
        averaged: Whether the result is the moving average of the weights (Ho et al. 2020, section 4).
    """

    name: str
    module: nn.Module
    loss: Callable[[torch.Generator], torch.Tensor]
    learning_rate: float
    averaged: bool = False


def train(training: Training, steps: int, seed: int, folder: Path, progress: Progress) -> None:
    """Train with AdamW, warm-up and cosine decay, from the checkpoint in ``folder`` if there is one.

    Afterwards the module has the weights of the last step, or their average, and is in evaluation mode.
    """
    state = _State(training, folder)
    start = state.load()
    if start:
        progress.note(f"{training.name}: resumed after step {start:,} of {steps:,}")
    training.module.train()
    saved, total, every = time.monotonic(), 0.0, max(steps // _NOTES, 1)
    for step in progress.track(range(start, steps), training.name, steps - start):
        loss = _step(training, state.optimizer, _learning_rate_factor(step, steps), seed, step)
        state.average.step(training.module.parameters())
        total += float(loss)
        if (step + 1) % every == 0:
            progress.note(f"{training.name}: step {step + 1:,} of {steps:,}, loss {total / every:.4f}")
            total = 0.0
        if time.monotonic() - saved > _SAVED_EVERY:
            state.save(step + 1)
            saved = time.monotonic()
    if start < steps:
        state.save(steps)
    if training.averaged:
        state.average.copy_to(training.module.parameters())
    training.module.eval()


def seconds_per_step(training: Training, seed: int, count: int = 4) -> float:
    """Return the median time of ``count`` steps after two warm-up steps. The weights are restored."""
    weights = {name: tensor.clone() for name, tensor in training.module.state_dict().items()}
    optimizer = _optimizer(training)
    training.module.train()
    times = []
    for step in range(count + 2):
        start = time.monotonic()
        _step(training, optimizer, 0.0, seed, step)
        times.append(time.monotonic() - start)
    training.module.load_state_dict(weights)
    return sorted(times[2:])[count // 2]


def _optimizer(training: Training) -> torch.optim.AdamW:
    return torch.optim.AdamW(training.module.parameters(), training.learning_rate, weight_decay=0.01)


def _step(training: Training, optimizer: torch.optim.AdamW, rate: float, seed: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed << 32) + step)
    torch.manual_seed((seed << 32) + step)
    optimizer.param_groups[0]["lr"] = rate * training.learning_rate
    loss = training.loss(generator)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(training.module.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def _learning_rate_factor(step: int, steps: int) -> float:
    warm = max(int(_WARM_UP * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def remove_checkpoint(training: Training, folder: Path) -> None:
    """Remove the checkpoint of a finished training."""
    _file(training, folder).unlink(missing_ok=True)


def _file(training: Training, folder: Path) -> Path:
    return folder / f"{training.name}.safetensors"


class _State:
    """State of a training, stored in one file that is replaced atomically."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training = training
        self.path = _file(training, folder)
        self.optimizer = _optimizer(training)
        self.average = import_diffusers().training_utils.EMAModel(
            training.module.parameters(), decay=_DECAY, use_ema_warmup=True
        )

    def load(self) -> int:
        """Load the checkpoint and return its number of steps, or 0 if there is none."""
        if not self.path.is_file():
            return 0
        tensors = load_file(self.path)
        step = int(tensors.pop("step"))
        parameters = dict(self.training.module.named_parameters())
        weights = {name: tensors[f"weights.{name}"] for name in self.training.module.state_dict()}
        self.training.module.load_state_dict(weights)
        for index, (name, parameter) in enumerate(parameters.items()):
            moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
            self.average.shadow_params[index] = tensors[f"average.{name}"]
        self.average.optimization_step = step
        return step

    def save(self, step: int) -> None:
        """Write the checkpoint to a temporary file, then rename it."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.training.module.state_dict().items()}
        for (name, parameter), shadow in zip(
            self.training.module.named_parameters(), self.average.shadow_params, strict=True
        ):
            tensors |= {f"{moment}.{name}": self.optimizer.state[parameter][moment] for moment in _MOMENTS}
            tensors[f"average.{name}"] = shadow
        tensors["step"] = torch.tensor(step)
        partial = self.path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self.path)


def load_or_make_plan(path: Path, make: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Return the stored plan of steps; make and store it first if there is none, so that resumed runs use the same."""
    if not path.is_file():
        plan = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    stored_plan: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return stored_plan
