"""Pruning of the blocks and channels of a diffusers UNet that matter least for its denoising loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.models.pipeline_folder import UNET
from compress.numerics.pruning import relevant_timesteps, weight_gates
from compress.plugins.diffusion.component_costs import (
    cost_rows,
    costs_of_component,
    count_parameters,
)
from compress.plugins.diffusion.noised_latents import (
    TRAIN,
    NoisedLatents,
    NoiseProcess,
    denoising_losses,
    encode_split,
    sample_rows,
)
from compress.plugins.diffusion.pipeline_model import GeneratorModel
from compress.plugins.diffusion.stage_settings import DenoiserPruning
from compress.plugins.diffusion.unet_blocks import (
    BKSDMSize,
    build_like_on_meta,
    require_unet,
    select_bk_sdm_blocks,
)
from compress.plugins.diffusion.unet_channels import (
    ChannelSet,
    channel_sets,
    narrow_config,
    narrow_unet,
    tied_stages,
    width_steps,
)
from compress.stages.prune.channels import ladder
from compress.tasks.inference import device_of, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from compress.stages.base import Context

_SIZES: dict[str, BKSDMSize] = {"bk-sdm-base": "base", "bk-sdm-small": "small", "bk-sdm-tiny": "tiny"}
_THIRDS = ("least noise", "some noise", "most noise")


@dataclass(frozen=True)
class LossProbe:
    """Denoising loss of UNets on the same latents, with the same noise at the same ``timesteps``.

    ``seed`` determines the noise of every timestep and batch, independent of the random state of training.
    """

    examples: Examples
    noising: NoiseProcess
    timesteps: Sequence[int]
    batch_size: int
    seed: int

    @classmethod
    def spaced(cls, examples: Examples, noising: NoiseProcess, count: int, batch_size: int, seed: int) -> LossProbe:
        """Return a probe at evenly spaced timesteps, each in the middle of its share. Every row has its prompt.

        Args:
            examples: Latents and conditions.
            noising: Noising that the UNet was trained with.
            count: Number of timesteps.
            batch_size: Number of examples in a batch.
            seed: Seed of the noise.
        """
        count = min(count, noising.steps)
        timesteps = [int((index + 0.5) * noising.steps / count) for index in range(count)]
        return cls(examples, replace(noising, dropped=0.0), timesteps, batch_size, seed)

    def batches(self, timestep: int, device: torch.device) -> Iterator[tuple[NoisedLatents, float]]:
        """Yield noised latents in batches, each with its share of all examples."""
        rows = len(self.examples)
        for start in range(0, rows, self.batch_size):
            indices = list(range(start, min(start + self.batch_size, rows)))
            batch = {name: value.to(device) for name, value in tensors(self.examples, indices).items()}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + timestep) * 10_007 + start)
            yield self.noising.sample(batch, torch.tensor(timestep), generator), len(indices) / rows

    @torch.no_grad()
    def losses(self, unet: nn.Module) -> torch.Tensor:
        """Return the mean denoising loss at each timestep [T]; puts the UNet in eval mode."""
        unet.eval()
        device = device_of(unet)
        losses = [
            sum(share * float(denoising_losses(unet, noised).mean()) for noised, share in self.batches(step, device))
            for step in self.timesteps
        ]
        return torch.tensor(losses, dtype=torch.float64)

    def mean_loss(self, unet: nn.Module) -> float:
        """Return the mean loss over timesteps."""
        return float(self.losses(unet).mean())


def accumulate_gates(
    unet: nn.Module, sets: Sequence[ChannelSet], probe: LossProbe, threshold: float, progress: Progress
) -> tuple[list[torch.Tensor], list[int]]:
    """Return dL/d xi of a gate xi at 1 on each channel [size] of each set, and the timesteps that L sums over.

    L is the sum of the denoising losses at timesteps whose loss exceeds ``threshold`` times the largest. At the others,
    where noise drowns the image, gradients carry little information (Fang et al. 2023, Diff-Pruning).

    Args:
        unet: UNet to prune.
        sets: Its sets of coupled channels.
        probe: Latents and timesteps.
        threshold: Share of the largest loss.
        progress: Progress display.
    """
    losses = probe.losses(unet)
    chosen = [probe.timesteps[index] for index in relevant_timesteps(losses, threshold).nonzero().flatten().tolist()]
    device = device_of(unet)
    unet.zero_grad()
    # Gradients of all batches and timesteps accumulate in the weights.
    for timestep in progress.track(chosen, "prune: importance", len(chosen)):
        for noised, share in probe.batches(timestep, device):
            torch.autograd.backward([denoising_losses(unet, noised).mean() * share])
    gates = []
    for channel_set in sets:
        total = torch.zeros(channel_set.coupling.size)
        # The gate's derivative is the sum over all layers that read the channels.
        for coupled in channel_set.coupling.readers:
            weight = unet.get_submodule(coupled.layer).weight
            assert isinstance(weight, nn.Parameter)
            if weight.grad is not None:
                products = weight_gates(weight.detach(), weight.grad, 1).float().cpu()
                total.index_add_(0, coupled.channels, products[coupled.features])
        gates.append(total)
    unet.zero_grad()
    return gates, chosen


def prune_denoiser(model: GeneratorModel, settings: DenoiserPruning, context: Context) -> None:
    """Prune the model's UNet by images of the train split, in place. Raises `StageError` if it has no UNet."""
    unet = require_unet(model.parts[UNET])
    examples, _ = encode_split(model, context, TRAIN, sample_rows(context, TRAIN, settings.importance_examples))
    noising = NoiseProcess.from_scheduler(model.scheduler)
    model.replace_part(UNET, prune_unet(unet, settings, examples, noising, context))


def check_pruning(component: nn.Module, settings: DenoiserPruning) -> None:
    """Try the named blocks, and trace the channels, of a UNet that may have no weights. Raises `StageError`."""
    unet = require_unet(component)
    if settings.blocks is not None:
        unet = select_bk_sdm_blocks(unet, _SIZES[settings.blocks])
    if settings.parameters is not None:
        channel_sets(unet)


def prune_unet(
    unet: UNet2DConditionModel, settings: DenoiserPruning, examples: Examples, noising: NoiseProcess, context: Context
) -> UNet2DConditionModel:
    """Return a UNet with fewer blocks and narrower stages; the weights of ``unet`` are consumed.

    Args:
        unet: UNet to prune.
        settings: Settings of the stage.
        examples: All `latent_examples` that importance is measured on.
        noising: Noising that the UNet was trained with.
        context: Context of the stage.

    Raises:
        StageError: The UNet cannot be pruned in this way.
    """
    probe = LossProbe.spaced(examples, noising, settings.timesteps, settings.batch_size, context.seed)
    costs_before, losses_before = costs_of_component(unet), probe.losses(unet)
    if settings.blocks is not None:
        unet = select_bk_sdm_blocks(unet, _SIZES[settings.blocks])
    if settings.parameters is not None:
        sets = channel_sets(unet)
        gates, timesteps = accumulate_gates(unet, sets, probe, settings.threshold, context.progress)
        widths = choose_widths(unet, sets, gates, settings.parameters)
        context.note(
            f"prune: stages of {list(unet.config.block_out_channels)} -> {list(widths)} channels, by importance at "
            f"{len(timesteps)} of {len(probe.timesteps)} timesteps, up to {max(timesteps)}"
        )
        unet = narrow_unet(unet, sets, gates, widths, probe.noising.steps)
    costs, losses_after = costs_of_component(unet), probe.losses(unet)
    context.note(
        f"prune: {costs_before.parameters:,} -> {costs.parameters:,} parameters; denoising loss before training "
        f"{float(losses_before.mean()):.4f} -> {float(losses_after.mean()):.4f}"
    )
    thirds = (
        [round(float(part.mean()), 5) for part in values.tensor_split(len(_THIRDS))]
        for values in (losses_before, losses_after)
    )
    header = ("timesteps", "before", "after pruning")
    context.add_table("Denoising loss by timestep", header, zip(_THIRDS, *thirds, strict=True))
    header = ("", "before", "after pruning")
    context.add_table("A call of the UNet, predicted", header, cost_rows(costs_before, costs))
    return unet


def choose_widths(
    unet: UNet2DConditionModel, sets: Sequence[ChannelSet], gates: Sequence[torch.Tensor], share: float
) -> tuple[int, ...]:
    """Return widths of stages that remove ``share`` of the parameters. Neighbours that differ stay different.

    Args:
        unet: UNet to prune.
        sets: Its sets of coupled channels.
        gates: Importance of the channels of each set, [size].
        share: Share of the parameters to remove.

    Raises:
        StageError: Even the smallest widths have more parameters.
    """
    tied, steps = tied_stages(unet), width_steps(unet, sets)
    # The possible widths of each group of tied stages, largest first, and the total importance that each removes.
    rungs, lost = list[list[int]](), list[list[float]]()
    for stages in tied:
        widths_of_group = ladder(
            unet.config.block_out_channels[stages[0]], math.lcm(*(steps[stage] for stage in stages))
        )
        pairs = [pair for pair in zip(sets, gates, strict=True) if pair[0].stage in stages]
        rungs.append(widths_of_group)
        lost.append([sum(channels.lost(scores, width) for channels, scores in pairs) for width in widths_of_group])

    def stage_widths(positions: Sequence[int]) -> tuple[int, ...]:
        """Return the width of each stage, from the position of each group in its rungs."""
        return tuple(
            group[position] for stages, group, position in zip(tied, rungs, positions, strict=True) for _ in stages
        )

    def cost(positions: Sequence[int]) -> int:
        return count_parameters(build_like_on_meta(unet, narrow_config(unet, sets, stage_widths(positions))))

    positions = [0] * len(rungs)
    initial = current = cost(positions)
    # Greedy search: take the step down that loses the least importance for the parameters that it saves.
    while current > initial * (1 - share):
        best: tuple[float, int, int] | None = None
        for index, position in enumerate(positions):
            if position + 1 == len(rungs[index]):
                continue
            lower = [*positions[:index], position + 1, *positions[index + 1 :]]
            group_widths = [group[rung] for group, rung in zip(rungs, lower, strict=True)]
            if any(width == following for width, following in pairwise(group_widths)):
                continue
            lower_cost, loss = cost(lower), lost[index][position + 1] - lost[index][position]
            if lower_cost < current and (best is None or loss / (current - lower_cost) < best[0]):
                best = loss / (current - lower_cost), index, lower_cost
        if best is None:
            raise StageError(
                f"Pruning channels can remove {1 - current / initial:.1%}, and not {share:.1%}.",
                expected=f"stages no narrower than {[group[-1] for group in rungs]}, in multiples of {steps}",
                hint="remove less, or blocks first",
            )
        _, index, current = best
        positions[index] += 1
    return stage_widths(positions)
