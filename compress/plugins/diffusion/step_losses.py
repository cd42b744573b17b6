"""What a denoiser that draws in fewer steps is scored on: three losses over batches of x and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from compress.plugins.diffusion.noise_prediction import (
    Level,
    NoiseTable,
    PredictionType,
    boundary_scalings,
    clean_of,
    ddim_step,
    extrapolated,
    guidance_embedding,
    guided,
    noised,
    progressive_target,
    pseudo_huber,
    truncated_snr,
)
from compress.plugins.diffusion.noised_latents import TEXT

TOLD = "timestep_cond"
"""By diffusers' name, the embedding that tells a denoiser of the guidance."""


@dataclass(frozen=True)
class Batch:
    """``clean`` [B, ...]; ``text`` [B, tokens, width], and the guidance scales [B], where there are any."""

    clean: torch.Tensor
    text: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(frozen=True)
class Denoiser:
    """A network of diffusers, what it predicts, and the width of the embedding that tells it of guidance, or 0.

    With ``empty`` [1, tokens, width], the empty prompt, it is asked twice and guided by the difference.
    """

    network: nn.Module
    kind: PredictionType
    table: NoiseTable
    told: int = 0
    empty: torch.Tensor | None = None

    def clean(self, noisy: torch.Tensor, times: torch.Tensor, batch: Batch, network: object = None) -> torch.Tensor:
        """x [B, ...] of ``noisy`` at timesteps [B], in float32; ``network`` computes in place of its own."""
        level = self.table.at(times, noisy.ndim)
        if self.empty is None:
            return clean_of(self.kind, self._output(noisy, times, batch, batch.text, network), noisy, level)
        assert batch.text is not None and batch.scales is not None
        texts = torch.cat([batch.text, self.empty.to(batch.text).expand_as(batch.text)])
        twice = torch.cat([noisy, noisy]), torch.cat([times, times])
        wanted, without = self._output(*twice, batch, texts, network).chunk(2)
        scales = batch.scales.reshape(-1, *[1] * (noisy.ndim - 1))
        return clean_of(self.kind, guided(wanted, without, scales), noisy, level)

    def _output(
        self, noisy: torch.Tensor, times: torch.Tensor, batch: Batch, text: torch.Tensor | None, network: Any
    ) -> torch.Tensor:
        options: dict[str, Any] = {} if text is None else {TEXT: text}
        if self.told:
            assert batch.scales is not None
            options[TOLD] = guidance_embedding(batch.scales, self.told)
        found: torch.Tensor = (network or self.network)(noisy, times, return_dict=False, **options)[0]
        return found.float()


def _times(batch: Batch, among: torch.Tensor) -> torch.Tensor:
    """Timesteps [B], each of them as likely."""
    drawn = torch.randint(len(among), (len(batch),))
    return among[drawn].to(batch.clean.device)


def _noised(batch: Batch, level: Level) -> torch.Tensor:
    return noised(batch.clean, torch.randn(batch.clean.shape).to(batch.clean.device), level)


def _error(found: torch.Tensor, wanted: torch.Tensor, level: Level) -> torch.Tensor:
    return (truncated_snr(level) * (found - wanted).square()).mean()


@dataclass(frozen=True)
class Match:
    """The student says at every timestep what the guided teacher does (Meng et al. 2023, section 3.1)."""

    teacher: Denoiser
    student: Denoiser

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The error of x, weighted by the truncated signal-to-noise ratio."""
        table = self.teacher.table
        times = _times(batch, torch.arange(len(table)))
        level = table.at(times, batch.clean.ndim)
        noisy = _noised(batch, level)
        with torch.no_grad():
            wanted = self.teacher.clean(noisy, times, batch)
        return _error(self.student.clean(noisy, times, batch, network), wanted, level)


@dataclass(frozen=True)
class Join:
    """One DDIM step of the student's ``steps`` does what ``joined`` of the teacher do.

    Two, as in Salimans and Ho 2022, algorithm 2, or more at once; those of DDIM, or of second order.
    """

    teacher: Denoiser
    student: Denoiser
    steps: int
    joined: int = 2
    second_order: bool = False

    @property
    def times(self) -> torch.Tensor:
        """Where the student's steps begin: those of diffusers' DDIMScheduler with timestep_spacing "trailing"."""
        trained = len(self.student.table)
        return torch.tensor([round(trained * place / self.steps) - 1 for place in range(self.steps, 0, -1)])

    def target(self, noisy: torch.Tensor, times: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The x [B, ...] by which one step from ``noisy`` arrives where those of the teacher do."""
        table, axes = self.teacher.table, noisy.ndim
        stride = len(table) // self.steps
        places = [times - stride * place // self.joined for place in range(self.joined + 1)]
        levels = [table.at(place, axes) for place in places]
        reached, found = noisy, list[torch.Tensor]()
        for at, (here, there) in enumerate(pairwise(levels)):
            found.append(self.teacher.clean(reached, places[at], batch))
            clean = found[-1]
            if self.second_order and at:
                clean = extrapolated(clean, found[-2], levels[at - 1], here, there)
            reached = ddim_step(clean, reached, here, there)
        return progressive_target(noisy, reached, levels[0], levels[-1])

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The error of x, weighted by the truncated signal-to-noise ratio."""
        times = _times(batch, self.times)
        level = self.student.table.at(times, batch.clean.ndim)
        noisy = _noised(batch, level)
        with torch.no_grad():
            wanted = self.target(noisy, times, batch)
        return _error(self.student.clean(noisy, times, batch, network), wanted, level)


class Averaged(nn.Module):
    """A network, and a moving average of its weights as buffers, so that a kept training has them too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for place, weight in enumerate(network.parameters()):
            self.register_buffer(f"average_{place}", weight.detach().clone())

    def forward(self, *args: object, **options: object) -> Any:
        """The network's."""
        return self.network(*args, **options)

    def average(self, *args: object, **options: object) -> Any:
        """What the network gives with the averaged weights."""
        return torch.func.functional_call(self.network, dict(self._averages()), args, options)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average, in place."""
        weights: Mapping[str, nn.Parameter] = dict(self.network.named_parameters())
        for name, average in self._averages():
            average.lerp_(weights[name].detach(), 1 - decay)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the network its averaged weights, in place."""
        weights = dict(self.network.named_parameters())
        for name, average in self._averages():
            weights[name].copy_(average)

    def _averages(self) -> list[tuple[str, torch.Tensor]]:
        names = (name for name, _ in self.network.named_parameters())
        return [(name, self.get_buffer(f"average_{place}")) for place, name in enumerate(names)]


@dataclass(frozen=True)
class Agree:
    """Neighbours on a path of the teacher have one end (Luo et al. 2023, algorithm 1).

    The path is that of the teacher's DDIM in ``steps``; the nearer neighbour is judged by ``averaged``.
    """

    teacher: Denoiser
    student: Denoiser
    steps: int
    averaged: Averaged
    scaling: float
    huber: bool

    @property
    def times(self) -> torch.Tensor:
        """Those of diffusers' LCMScheduler with as many original_inference_steps."""
        stride = len(self.student.table) // self.steps
        return torch.arange(1, self.steps + 1) * stride - 1

    def end(self, noisy: torch.Tensor, times: torch.Tensor, batch: Batch, network: object) -> torch.Tensor:
        """f(z, t) = c_skip z + c_out x: at timestep 0 it is z."""
        skip, out = boundary_scalings(times, noisy.ndim, self.scaling)
        return skip * noisy + out * self.student.clean(noisy, times, batch, network)

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """How far the two ends are apart."""
        table, axes = self.teacher.table, batch.clean.ndim
        times = _times(batch, self.times)
        nearer = (times - len(table) // self.steps).clamp(min=0)
        here, there = (table.at(time, axes) for time in (times, nearer))
        noisy = _noised(batch, here)
        with torch.no_grad():
            walked = ddim_step(self.teacher.clean(noisy, times, batch), noisy, here, there)
            wanted = self.end(walked, nearer, batch, self.averaged.average)
        found = self.end(noisy, times, batch, network)
        return pseudo_huber(found, wanted) if self.huber else (found - wanted).square().mean()
