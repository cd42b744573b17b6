"""Cut blocks and channels of a diffusers UNet that matter least for its denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.caption_images import TRAIN, latent_rows, some_places
from compress.plugins.diffusion.component_costs import cost_rows, costs_of, multiplications, parameters
from compress.plugins.diffusion.denoiser_importance import Probes, gates_over_timesteps
from compress.plugins.diffusion.narrow_unet import check_widths, narrow, narrow_config, tied_stages, width_steps
from compress.plugins.diffusion.noised_latents import Noising
from compress.plugins.diffusion.pipeline_model import GeneratorModel
from compress.plugins.diffusion.stage_settings import DenoiserPruning
from compress.plugins.diffusion.unet_blocks import (
    KeptBlocks,
    Size,
    all_blocks,
    bk_sdm_blocks,
    hollow_like,
    keep_blocks,
    require_unet,
    shared_blocks,
)
from compress.plugins.diffusion.unet_channels import ChannelSet, channel_sets
from compress.stages.prune.channels import ladder, nearest_rung
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from compress.stages.base import Context

_SIZES: dict[str, Size] = {"bk-sdm-base": "base", "bk-sdm-small": "small", "bk-sdm-tiny": "tiny"}
_THIRDS = ("least noise", "some noise", "most noise")


def prune_denoiser(model: GeneratorModel, settings: DenoiserPruning, context: Context) -> None:
    """Cut the model's UNet, by pictures of the train split, in place. Raises `StageError` where it has none."""
    unet = require_unet(model.parts[UNET])
    examples, _ = latent_rows(model, context, TRAIN, some_places(context, TRAIN, settings.importance_examples))
    model.replace_part(UNET, prune_unet(unet, settings, examples, Noising.of(model.scheduler), context))


def check_cut(unet: UNet2DConditionModel, settings: DenoiserPruning) -> None:
    """Try on a UNet that may have no weights what the settings name: blocks, and widths. Raises `StageError`."""
    require_unet(unet)
    if settings.blocks is not None:
        unet = keep_blocks(unet, bk_sdm_blocks(unet, _SIZES[settings.blocks]))
    if settings.cuts_channels:
        sets = channel_sets(unet)
        if settings.block_out_channels is not None:
            check_widths(unet, settings.block_out_channels, sets)


def prune_unet(
    unet: UNet2DConditionModel, settings: DenoiserPruning, examples: Examples, noising: Noising, context: Context
) -> UNet2DConditionModel:
    """A UNet with fewer blocks and narrower stages; ``unet`` is spent.

    Importance sees all of ``examples``, those of `latent_examples`. Raises `StageError` for what cannot be cut.
    """
    probes = Probes.spaced(examples, noising, settings.timesteps, settings.batch_size, context.seed)
    before, whole = costs_of(unet), probes.losses(unet)
    if settings.blocks is not None:
        unet = keep_blocks(unet, bk_sdm_blocks(unet, _SIZES[settings.blocks]))
    if settings.pairs:
        unet = _without_pairs(unet, settings, probes, context)
    if settings.cuts_channels:
        unet = _narrowed(unet, settings, probes, context)
    after, left = costs_of(unet), probes.losses(unet)
    context.note(
        f"prune: {before.parameters:,} -> {after.parameters:,} parameters; denoising loss before any teaching "
        f"{float(whole.mean()):.4f} -> {float(left.mean()):.4f}"
    )
    rows = zip(_THIRDS, _by_thirds(whole), _by_thirds(left), strict=True)
    context.add_table("Denoising loss by timestep", ("timesteps", "before", "after the cut"), rows)
    context.add_table("A call of the UNet, predicted", ("", "before", "after the cut"), cost_rows(before, after))
    return unet


def _by_thirds(losses: torch.Tensor) -> list[float]:
    return [round(float(part.mean()), 5) for part in losses.tensor_split(len(_THIRDS))]


@dataclass(frozen=True)
class Removal:
    """What went, in words, and the loss without it and all that went before."""

    what: str
    loss: float


def _without_pairs(
    unet: UNet2DConditionModel, settings: DenoiserPruning, probes: Probes, context: Context
) -> UNet2DConditionModel:
    start = probes.loss(unet)
    kept, removed = least_missed(unet, settings.pairs, settings.middle, probes.loss)
    losses = [start, *(one.loss for one in removed)]
    rows = [(one.what, round(one.loss, 5), round(one.loss - was, 5)) for one, was in zip(removed, losses, strict=False)]
    context.add_table("Blocks that went", ("block", "loss", "rise"), rows)
    return keep_blocks(unet, kept)


def least_missed(
    unet: UNet2DConditionModel, count: int, middle: bool, judge: Callable[[Any], float]
) -> tuple[KeptBlocks, list[Removal]]:
    """Remove ``count`` pairs, each the one whose absence, tried, raises the loss of ``judge`` least.

    A pair on the way down goes together with one that reads its stage on the way up. With ``middle`` the block there
    may go as one of them. Raises `StageError` where there are no more that can go.
    """
    kept, removed = all_blocks(unet), list[Removal]()
    for _ in range(count):
        tried = {
            what: (judge(made), one)
            for what, one in _candidates(kept, middle)
            if (made := shared_blocks(unet, one)) is not None
        }
        if not tried:
            raise StageError(
                f"Only {len(removed)} blocks of this UNet can go, and {count} are to.",
                where="pairs",
                expected="a pair left in every stage, and stages that can be joined without it",
                hint="remove fewer, or cut channels",
            )
        what = min(tried, key=lambda one: tried[one][0])
        loss, kept = tried[what]
        removed.append(Removal(what, loss))
    return kept, removed


def _candidates(kept: KeptBlocks, middle: bool) -> list[tuple[str, KeptBlocks]]:
    found = [
        (f"stage {stage}: pair {down} down, pair {up} up", kept.without(stage, down, up))
        for stage, places in enumerate(kept.down)
        if len(places) > 1
        for down in places
        for up in kept.up[stage]
    ]
    return [*found, ("the block in the middle", replace(kept, middle=False))] if middle and kept.middle else found


def _narrowed(
    unet: UNet2DConditionModel, settings: DenoiserPruning, probes: Probes, context: Context
) -> UNet2DConditionModel:
    sets = channel_sets(unet)
    if settings.block_out_channels is not None:
        check_widths(unet, settings.block_out_channels, sets)
    gates, timesteps = gates_over_timesteps(unet, sets, probes, settings.threshold, context.progress)
    widths = _widths(unet, sets, gates, settings)
    context.note(
        f"prune: stages of {list(unet.config.block_out_channels)} -> {list(widths)} channels, by importance at "
        f"{len(timesteps)} of {len(probes.timesteps)} timesteps, up to {max(timesteps)}"
    )
    return narrow(unet, sets, gates, widths, probes.noising.steps)


def _widths(
    unet: UNet2DConditionModel, sets: Sequence[ChannelSet], gates: Sequence[torch.Tensor], settings: DenoiserPruning
) -> tuple[int, ...]:
    if settings.block_out_channels is not None:
        return settings.block_out_channels
    choice = _Choice.of(unet, sets, gates)
    if settings.channels:
        counts = [nearest_rung(rungs, rungs[0] * (1 - settings.channels)) for rungs in choice.rungs]
        widths = choice.widths(counts)
    else:
        share = settings.parameters if settings.parameters is not None else settings.flops
        assert share is not None
        figure: Callable[[Any], float] = parameters if settings.parameters is not None else multiplications
        widths = choice.under(share, lambda tried: figure(hollow_like(unet, narrow_config(unet, sets, tried))))
    if widths == tuple(unet.config.block_out_channels):
        raise StageError(
            f"In multiples of {width_steps(unet, sets)}, no channel of stages of {list(widths)} goes.",
            expected="stages of several times that: of the groups of group norm and of whole attention heads",
            hint="remove a larger share, or blocks",
        )
    return widths


@dataclass(frozen=True)
class _Choice:
    """Widths that stages may have, downwards, and what the importance of all that goes with each adds up to.

    Stages that must be equally wide are one: ``stages[i]`` share ``rungs[i]``, and ``lost[i]`` goes with these.
    """

    stages: list[list[int]]
    rungs: list[list[int]]
    lost: list[list[float]]

    @classmethod
    def of(cls, unet: UNet2DConditionModel, sets: Sequence[ChannelSet], gates: Sequence[torch.Tensor]) -> _Choice:
        tied, steps = tied_stages(unet), width_steps(unet, sets)
        rungs, lost = [], []
        for stages in tied:
            width, step = unet.config.block_out_channels[stages[0]], int(np.lcm.reduce([steps[one] for one in stages]))
            rungs.append(ladder(width, step))
            mine = [(one, scores) for one, scores in zip(sets, gates, strict=True) if one.stage in stages]
            lost.append([sum(_lost(one, scores, rung) for one, scores in mine) for rung in rungs[-1]])
        return cls(tied, rungs, lost)

    def widths(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The width of each stage."""
        return tuple(count for stages, count in zip(self.stages, counts, strict=True) for _ in stages)

    def under(self, share: float, cost: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
        """Widths without ``share`` of the cost: the step down that loses least for what it saves, again and again.

        Neighbours that differ stay different. Raises `StageError` where even the lowest cost more.
        """
        at = [0] * len(self.rungs)
        whole = now = cost(self._widths_at(at))
        while now > whole * (1 - share):
            best: tuple[float, int, float] | None = None
            for index in range(len(at)):
                lower = [place + (other == index) for other, place in enumerate(at)]
                if lower[index] == len(self.rungs[index]) or self._alike(lower):
                    continue
                costs = cost(self._widths_at(lower))
                lost = self.lost[index][lower[index]] - self.lost[index][at[index]]
                if costs < now and (best is None or lost / (now - costs) < best[0]):
                    best = lost / (now - costs), index, costs
            if best is None:
                raise StageError(
                    f"Cutting channels can remove {1 - now / whole:.1%}, and not {share:.1%}.",
                    expected=f"stages no narrower than {[rungs[-1] for rungs in self.rungs]}",
                    hint="remove less, or blocks first",
                )
            _, index, now = best
            at[index] += 1
        return self._widths_at(at)

    def _widths_at(self, at: Sequence[int]) -> tuple[int, ...]:
        return self.widths([rungs[place] for rungs, place in zip(self.rungs, at, strict=True)])

    def _alike(self, at: Sequence[int]) -> bool:
        found = [rungs[place] for rungs, place in zip(self.rungs, at, strict=True)]
        return any(one == other for one, other in pairwise(found))


def _lost(one: ChannelSet, gates: torch.Tensor, width: int) -> float:
    """The importance of the channels that go in a stage of ``width``."""
    scores = one.scores(gates)
    stay = one.kept(gates, width)[:: one.unit] // one.unit
    return float(scores.sum() - scores[stay].sum())
