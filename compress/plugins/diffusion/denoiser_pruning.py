"""Pruning of the blocks and channels of a diffusers UNet that matter least for its denoising loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
    count_multiplications,
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
    UNetBlocks,
    all_blocks,
    bk_sdm_blocks,
    build_like_on_meta,
    require_unet,
    select_blocks,
    select_shared_blocks,
)
from compress.plugins.diffusion.unet_channels import (
    ChannelSet,
    channel_sets,
    check_widths,
    narrow_config,
    narrow_unet,
    tied_stages,
    width_steps,
)
from compress.stages.prune.channels import ladder, nearest_rung
from compress.tasks.inference import device_of, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from compress.plugins.diffusion.unet_blocks import UNet
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
    """Try the named blocks and widths on a UNet, which may have no weights. Raises `StageError`."""
    unet = require_unet(component)
    if settings.blocks is not None:
        unet = select_blocks(unet, bk_sdm_blocks(unet, _SIZES[settings.blocks]))
    if settings.prunes_channels:
        sets = channel_sets(unet)
        if settings.block_out_channels is not None:
            check_widths(unet, settings.block_out_channels, sets)


def prune_unet(
    unet: UNet, settings: DenoiserPruning, examples: Examples, noising: NoiseProcess, context: Context
) -> UNet:
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
        unet = select_blocks(unet, bk_sdm_blocks(unet, _SIZES[settings.blocks]))
    if settings.pairs:
        losses = [probe.mean_loss(unet)]
        blocks, removals = remove_least_important(unet, settings.pairs, settings.middle, probe.mean_loss)
        losses += removals.values()
        rows = [
            (block, round(loss, 5), round(loss - previous, 5))
            for (block, loss), previous in zip(removals.items(), losses, strict=False)
        ]
        context.add_table("Removed blocks", ("block", "loss", "rise"), rows)
        unet = select_blocks(unet, blocks)
    if settings.prunes_channels:
        sets = channel_sets(unet)
        if settings.block_out_channels is not None:
            # Widths of the recipe are checked before importance, which takes minutes.
            check_widths(unet, settings.block_out_channels, sets)
        gates, timesteps = accumulate_gates(unet, sets, probe, settings.threshold, context.progress)
        widths = settings.block_out_channels or _choose_widths(unet, sets, gates, settings)
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


def remove_least_important(
    unet: UNet, count: int, middle: bool, measure: Callable[[UNet], float]
) -> tuple[UNetBlocks, dict[str, float]]:
    """Remove pairs one by one: each time the one without which the loss rises least.

    A pair on the way down is removed with one that reads its stage on the way up.

    Args:
        unet: UNet to prune.
        count: Number of pairs to remove.
        middle: Whether the middle block may be removed as one of them.
        measure: Returns the loss of a UNet.

    Returns:
        The remaining blocks, and for each removed block the loss without it and all blocks that were removed before.

    Raises:
        StageError: Fewer pairs can be removed.
    """
    blocks, removals = all_blocks(unet), dict[str, float]()
    for _ in range(count):
        candidates = {
            f"stage {stage}: pair {down} down, pair {up} up": blocks.without(stage, down, up)
            for stage, pairs in enumerate(blocks.down)
            if len(pairs) > 1
            for down in pairs
            for up in blocks.up[stage]
        }
        if middle and blocks.middle:
            candidates["the block in the middle"] = replace(blocks, middle=False)
        # Trials share the UNet's tensors. Candidates whose stages do not fit together are skipped.
        trials = {
            name: measure(smaller)
            for name, candidate in candidates.items()
            if (smaller := select_shared_blocks(unet, candidate)) is not None
        }
        if not trials:
            raise StageError(
                f"Only {len(removals)} blocks of this UNet can be removed, and {count} are to.",
                where="pairs",
                expected="a pair left in every stage, and stages that can be joined without it",
                hint="remove fewer, or prune channels",
            )
        best = min(trials, key=lambda name: trials[name])
        blocks = candidates[best]
        removals[best] = trials[best]
    return blocks, removals


def _choose_widths(
    unet: UNet, sets: Sequence[ChannelSet], gates: Sequence[torch.Tensor], settings: DenoiserPruning
) -> tuple[int, ...]:
    search = _WidthSearch(unet, sets, gates)
    if settings.channels:
        counts = [nearest_rung(rungs, rungs[0] * (1 - settings.channels)) for rungs in search.rungs]
        widths = search.stage_widths(counts)
    else:
        share = settings.parameters if settings.parameters is not None else settings.flops
        assert share is not None
        count: Callable[[UNet], int] = count_parameters if settings.parameters is not None else count_multiplications
        widths = search.widths_below(
            share, lambda candidate: count(build_like_on_meta(unet, narrow_config(unet, sets, candidate)))
        )
    if widths == tuple(unet.config.block_out_channels):
        raise StageError(
            f"In multiples of {width_steps(unet, sets)}, no channel of stages of {list(widths)} is removed.",
            expected="stages of several times that: of the groups of group norm and of whole attention heads",
            hint="remove a larger share, or blocks",
        )
    return widths


class _WidthSearch:
    """Possible widths of stages and the importance that each removes.

    ``stages[i]`` are stages that must be equally wide. ``rungs[i]`` are their widths, largest first, and ``lost[i]``
    the total importance of the channels that each width removes.
    """

    def __init__(self, unet: UNet, sets: Sequence[ChannelSet], gates: Sequence[torch.Tensor]) -> None:
        self.stages, steps = tied_stages(unet), width_steps(unet, sets)
        self.rungs: list[list[int]] = []
        self.lost: list[list[float]] = []
        for stages in self.stages:
            step = math.lcm(*(steps[stage] for stage in stages))
            rungs = ladder(unet.config.block_out_channels[stages[0]], step)
            pairs = [pair for pair in zip(sets, gates, strict=True) if pair[0].stage in stages]
            self.rungs.append(rungs)
            self.lost.append([sum(channels.lost(scores, rung) for channels, scores in pairs) for rung in rungs])

    def stage_widths(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Return the width of each stage, from that of each group."""
        return tuple(count for stages, count in zip(self.stages, counts, strict=True) for _ in stages)

    def widths_below(self, share: float, cost: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
        """Return widths that remove ``share`` of the cost. Neighbours that differ stay different.

        Raises:
            StageError: Even the smallest widths cost more.
        """
        rungs_at, widths = [0] * len(self.rungs), [rungs[0] for rungs in self.rungs]
        initial = current = cost(self.stage_widths(widths))
        # Greedy search: take the step down that loses the least importance for the cost that it saves.
        while current > initial * (1 - share):
            best: tuple[float, int, float] | None = None
            for index, (rungs, lost, rung) in enumerate(zip(self.rungs, self.lost, rungs_at, strict=True)):
                if rung + 1 == len(rungs):
                    continue
                lower = [*widths[:index], rungs[rung + 1], *widths[index + 1 :]]
                if any(width == following for width, following in pairwise(lower)):
                    continue
                lower_cost, loss = cost(self.stage_widths(lower)), lost[rung + 1] - lost[rung]
                if lower_cost < current and (best is None or loss / (current - lower_cost) < best[0]):
                    best = loss / (current - lower_cost), index, lower_cost
            if best is None:
                raise StageError(
                    f"Pruning channels can remove {1 - current / initial:.1%}, and not {share:.1%}.",
                    expected=f"stages no narrower than {[rungs[-1] for rungs in self.rungs]}",
                    hint="remove less, or blocks first",
                )
            _, index, current = best
            rungs_at[index] += 1
            widths[index] = self.rungs[index][rungs_at[index]]
        return self.stage_widths(widths)
