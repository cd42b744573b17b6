"""What a UNet's blocks and channels matter for the denoising loss, gathered over timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from compress.numerics.pruning import relevant_timesteps, weight_gates
from compress.plugins.diffusion.noised_latents import NoisedLatents, Noising, denoising_losses
from compress.plugins.diffusion.unet_channels import ChannelSet
from compress.tasks.inference import device_of, tensors
from compress.tasks.task import Examples
from compress.utils.progress import Progress


@dataclass(frozen=True)
class Probes:
    """Latents that are given the same noise at the same ``timesteps`` whenever a UNet is asked.

    ``seed`` draws the noise, for every timestep and batch anew, and from no random state that training uses.
    """

    examples: Examples
    noising: Noising
    timesteps: Sequence[int]
    batch_size: int
    seed: int

    @classmethod
    def spaced(cls, examples: Examples, noising: Noising, count: int, batch_size: int, seed: int) -> Probes:
        """``count`` timesteps, each in the middle of its share of the schedule; every row has its prompt."""
        count = min(count, noising.steps)
        timesteps = [int((place + 0.5) * noising.steps / count) for place in range(count)]
        return cls(examples, replace(noising, dropped=0.0), timesteps, batch_size, seed)

    def at(self, timestep: int, device: torch.device) -> Iterator[tuple[NoisedLatents, float]]:
        """Noised latents in batches, each with the share that it is of all examples."""
        rows = len(self.examples)
        for start in range(0, rows, self.batch_size):
            places = list(range(start, min(start + self.batch_size, rows)))
            batch = {name: value.to(device) for name, value in tensors(self.examples, places).items()}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + timestep) * 10_007 + start)
            yield self.noising.draw(batch, torch.tensor(timestep), generator), len(places) / rows

    @torch.no_grad()
    def losses(self, unet: nn.Module) -> torch.Tensor:
        """The mean denoising loss at each timestep [T], of a UNet in eval mode."""
        unet.eval()
        device = device_of(unet)
        found = [
            sum(share * float(denoising_losses(unet, noised).mean()) for noised, share in self.at(timestep, device))
            for timestep in self.timesteps
        ]
        return torch.tensor(found, dtype=torch.float64)

    def loss(self, unet: nn.Module) -> float:
        """The mean over timesteps."""
        return float(self.losses(unet).mean())


def gates_over_timesteps(
    unet: nn.Module, sets: Sequence[ChannelSet], probes: Probes, threshold: float, progress: Progress
) -> tuple[list[torch.Tensor], list[int]]:
    """dL/d xi of a gate xi at 1 on each channel [size] of each set, and the timesteps that it was gathered over.

    L is the sum of the denoising losses of those timesteps whose loss is more than ``threshold`` of the largest: at the
    others, where noise drowns the picture, gradients tell little (Fang et al. 2023, Diff-Pruning).
    """
    losses = probes.losses(unet)
    chosen = [probes.timesteps[place] for place in relevant_timesteps(losses, threshold).nonzero().flatten().tolist()]
    device = device_of(unet)
    unet.zero_grad()
    for timestep in progress.track(chosen, "prune: importance", len(chosen)):
        for noised, share in probes.at(timestep, device):
            torch.autograd.backward([denoising_losses(unet, noised).mean() * share])
    gates = [_gates(unet, one) for one in sets]
    unet.zero_grad()
    return gates, chosen


def _gates(unet: nn.Module, one: ChannelSet) -> torch.Tensor:
    """Sums over every layer that reads the channels."""
    found = torch.zeros(one.coupling.size)
    for part in one.coupling.readers:
        layer = unet.get_submodule(part.layer)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None:
            products = weight_gates(weight.detach(), weight.grad, 1).float().cpu()
            found.index_add_(0, part.channels, products[part.features])
    return found
