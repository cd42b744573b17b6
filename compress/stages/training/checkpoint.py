"""A training that outlives a kill: weights, moments, random state and figures in one file of safetensors."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from compress.models.safetensors_file import write_whole

_EVERY_SECONDS = 60.0
_SHARE = 0.05
"""Of the time at most, that goes into writing."""
_MODEL, _MOMENTS, _BEST, _RANDOM = "model.", "moments.", "best.", "random"


@dataclass(frozen=True)
class TrainingState:
    """State of a training. ``figures`` are plain JSON; ``best`` is the best epoch's state, if one was kept."""

    figures: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None = None


@dataclass
class TrainingCheckpoint:
    """The file in ``folder``, written about once a minute and less often where that takes long."""

    folder: Path
    every_seconds: float = _EVERY_SECONDS
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0
    _random: tuple[torch.Tensor, dict[str, Any]] | None = None

    @property
    def file(self) -> Path:
        """Return the checkpoint's file."""
        return self.folder / "training.safetensors"

    def is_due(self) -> bool:
        """Return whether it is time to write again."""
        return time.monotonic() - self._written >= max(self.every_seconds, self._took / _SHARE)

    def write(self, state: TrainingState) -> None:
        """Put ``state``, and the random state as it is now, in place of what was kept before."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {_MODEL: state.tensors, _MOMENTS: state.moments, _BEST: state.best or {}}
        tensors = {f"{part}{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        name, words, *state_values = np.random.get_state()
        about = json.dumps(
            {
                **state.figures,
                "random": {"numpy": [name, np.asarray(words).tolist(), *state_values], "python": random.getstate()},
            }
        )
        write_whole(self.file, {**tensors, _RANDOM: torch.get_rng_state()}, {"state": about})
        self._written = time.monotonic()
        self._took = self._written - began

    def read(self) -> TrainingState | None:
        """Return the last written state, or None; `restore_random_state` uses it from then on."""
        if not self.file.is_file():
            return None
        parts: dict[str, dict[str, torch.Tensor]] = {_MODEL: {}, _MOMENTS: {}, _BEST: {}}
        with safe_open(self.file, framework="pt") as stored_file:
            figures = json.loads(stored_file.metadata()["state"])
            for name in stored_file.keys():  # noqa: SIM118
                for part, held in parts.items():
                    if name.startswith(part):
                        held[name.removeprefix(part)] = stored_file.get_tensor(name)
            self._random = stored_file.get_tensor(_RANDOM), figures.pop("random")
        return TrainingState(figures, parts[_MODEL], parts[_MOMENTS], parts[_BEST] or None)

    def restore_random_state(self) -> None:
        """Let torch, numpy and Python draw what they would have drawn next; once after each `read`."""
        if self._random is None:
            return
        state, figures = self._random
        self._random = None
        torch.set_rng_state(state)
        name, words, *state_values = figures["numpy"]
        np.random.set_state((name, np.array(words, dtype=np.uint32), *state_values))
        version, words, following = figures["python"]
        random.setstate((version, tuple(words), following))


def trained_tensors(module: nn.Module, extra: Sequence[nn.Parameter]) -> dict[str, torch.Tensor]:
    """Weights that learn, and buffers that a training moves, by name."""
    stored = module.state_dict().keys()
    learning = {name: value for name, value in module.named_parameters() if value.requires_grad}
    buffers = {name: value for name, value in module.named_buffers() if name in stored}
    return {**learning, **buffers, **{f"extra.{index}": value for index, value in enumerate(extra)}}


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return an optimizer's state of each parameter, by index and name of the moment."""
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {f"{index}.{name}": value for index, state in enumerate(states) for name, value in state.items()}


@torch.no_grad()
def put_back(tensors: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> None:
    """Give ``tensors`` the values that were kept of them, in place."""
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])


def put_moments_back(optimizer: torch.optim.Optimizer, kept: Mapping[str, torch.Tensor]) -> None:
    """Give an optimizer the moments that were kept, each on its parameter's device but for the count of steps."""
    parameters = [trained for group in optimizer.param_groups for trained in group["params"]]
    for name, value in kept.items():
        index, _, moment = name.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][moment] = value.to(parameter.device) if value.ndim else value
