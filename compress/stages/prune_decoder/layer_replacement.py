"""What blocks gave that are taken out, made up for by the layer before them (Shopkhoev et al. 2025, ReplaceMe).

That layer, the last of a feed-forward part, is solved so that what enters the block behind the gap is what entered it
before: least squares over the calibration text, of errors relative to the size of a token's states, since what reads
them norms them. Tokens of massive activations (Sun et al. 2024), the first of a text as a rule, are few, and all others
look at them: they count together as much as the others, without which the model may be lost. The text passes the whole
model and the cut one, with one block in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.models.hooks import capture_inputs, capture_outputs, removed_on_exit
from compress.models.structure import TransformerBlock, blocks
from compress.numerics.held_out_ridge import RegressionSums, solve
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.calibration_activations import CalibrationActivations
from compress.stages.blockwise.states import BlockRun, States
from compress.utils.errors import StageError
from compress.utils.torch_device import autocast, device_memory_errors

if TYPE_CHECKING:
    from compress.stages.base import Context

_HELD_OUT = 8
"""One of so many windows judges what the others were solved on."""
_MASSIVE = 10
"""So many times as large as the median token's states are massive ones."""
_APART = 0.05
"""What a block gives less without a layer's output is that output times a number, but for this share at most."""


def gaps(gone: Collection[int]) -> list[range]:
    """Neighbours among the blocks that go, ascending."""
    found: list[range] = []
    for index in sorted(gone):
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


@torch.no_grad()
def compensate_removed_blocks(
    stream: CalibrationActivations, gone: Collection[int], damping: float, context: Context
) -> dict[str, torch.Tensor]:
    """Return the layers that compensate for the removed blocks ``gone``: tensors by name, as laid out in the files.

    A gap is left as it is, with a remark, where nothing is before it, where the block there has no feed-forward layers
    that are known or norms what they give, and where the windows are too few or say nothing of others.
    """
    work, found = _Work(stream, damping, context), dict[str, torch.Tensor]()
    cut, at = stream, 0  # the cut model's states are the whole one's up to the first gap
    every = gaps(gone)
    for gap in every:
        cut, solved = work.pass_gap(cut, at, gap, goes_on=gap != every[-1])
        found, at = found | solved, gap.stop
    stream.forget(at)
    return found


@dataclass
class _Work:
    whole: CalibrationActivations
    damping: float
    context: Context

    @property
    def decoder(self) -> BlockwiseModel:
        return self.whole.decoder

    @cached_property
    def blocks(self) -> list[TransformerBlock]:
        return blocks(self.decoder.model)

    def pass_gap(
        self, cut: CalibrationActivations, at: int, gap: range, goes_on: bool
    ) -> tuple[CalibrationActivations, dict[str, torch.Tensor]]:
        """Pass the text from block ``at`` to the one after ``gap``; return the states there and solved tensors.

        Those states are not made where nothing ``goes_on`` with them.
        """
        before, behind = gap.start - 1, self.whole.as_float("cut")
        streams = [self.whole] if cut is self.whole else [self.whole, cut]
        what = f"prune_decoder: compensating for blocks {gap.start} to {gap.stop - 1}"
        for index in self.context.progress.track(range(at, gap.stop), what, gap.stop - at):
            with device_memory_errors(f"prune_decoder: {self.decoder.prefix}.{index}", "samples or sequence_length"):
                self.decoder.load(index)
                for stream in streams if index < before else [self.whole]:
                    stream.pass_as_it_is(index)
                    if index != before:
                        stream.forget(index)
                self.decoder.unload(index)
        if before < 0:
            if goes_on:
                embedded = (self.decoder.embedded(row) for row in torch.split(self.whole.ids, 1))
                behind.entering(gap.stop).write(embedded)
            return behind, {}
        with device_memory_errors(f"prune_decoder: {self.decoder.prefix}.{before}", "samples or sequence_length"):
            self.decoder.load(before)
            run = BlockRun.of(self.decoder, self.whole.config, before, self.whole.ids)
            states = cut.entering(before)
            solved = self._solved(run, states, gap)
            if goes_on:
                behind.entering(gap.stop).write(run(states[some]) for some in run.slices())
            self.decoder.unload(before)
        for stream in streams:
            stream.forget(before)
        return behind, solved

    def _solved(self, run: BlockRun, states: States, gap: range) -> dict[str, torch.Tensor]:
        """Solve the last layer of the loaded block in place, and return it as laid out in the files, or nothing."""
        told = f"prune_decoder: nothing compensates for blocks {gap.start} to {gap.stop - 1}"
        block = self.blocks[run.index]
        layer = None if block.feed_forward is None else block.feed_forward.output
        if not isinstance(layer, nn.Linear):
            self.context.note(f"{told}: {block.name} has no feed-forward layers that are known")
            return {}
        if len(self.whole.ids) < 2:
            self.context.note(f"{told}: of one window (samples) none is left to judge by")
            return {}
        counts = _share(run, states[run.slices()[0]], layer)
        name = self.decoder.name(layer)
        if counts is None:
            self.context.note(f"{told}: what {name} gives is not added to the states as it is")
            return {}
        with autocast(False, self.decoder.device):
            fitted, held_out = _sums(run, states, self.whole.entering(gap.stop), layer, counts)
            if not held_out.squares:  # they did nothing
                return {}
            try:
                change, left = solve(fitted, held_out, self.damping)
            except ValueError as error:
                raise StageError(
                    f"The layer {name} cannot make up for blocks {gap.start} to {gap.stop - 1}: {error}.",
                    hint="give more calibration text (samples), or raise damp_percent",
                ) from error
        if not left < 1:
            self.context.note(f"{told}: what {name} learns of some windows does not help in others (samples)")
            return {}
        layer.weight = nn.Parameter(self.decoder.rounded(name, layer.weight + change.T), requires_grad=False)
        self.context.note(
            f"prune_decoder: {name} compensates for blocks {gap.start} to {gap.stop - 1}: {left:.0%} of the change "
            "remains, in sequences that it was not solved on"
        )
        return dict(self.decoder.as_stored(name, layer))


def _share(run: BlockRun, hidden: torch.Tensor, layer: nn.Linear) -> float | None:
    """Return what the block adds for each unit of ``layer``'s output; None if that is not linear."""
    seen: list[torch.Tensor] = []
    with capture_outputs({"": layer}, lambda _, output: seen.append(output.float())):
        whole = run(hidden).float()
    with removed_on_exit([layer.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))]):
        less = whole - run(hidden).float()
    given_by = seen[0].reshape(less.shape)
    share = float((less * given_by).sum() / given_by.square().sum())
    apart = torch.linalg.vector_norm(less - share * given_by) / torch.linalg.vector_norm(less)
    return share if float(apart) <= _APART and share else None


def _sums(
    run: BlockRun, states: States, wanted: States, layer: nn.Linear, counts: float
) -> tuple[RegressionSums, RegressionSums]:
    """Return regression sums of ``layer``'s inputs and missing outputs, for sequences to solve on and to judge by."""
    rows, columns = layer.weight.shape
    both = tuple(RegressionSums.none(columns, rows, layer.weight.device) for _ in range(2))
    counting = _counting(torch.cat([wanted[some].square().mean(dim=-1).sqrt() for some in run.slices()]))
    seen: list[torch.Tensor] = []
    last = run.windows - 1
    for some in run.slices():
        with capture_inputs({"": layer}, lambda _, inputs: seen.append(inputs.float())):
            output = run(states[some]).float()
        aim = wanted[some]
        inputs = seen.pop().reshape(*aim.shape[:2], columns)
        weights = counting[some].unsqueeze(-1)
        for at, window in enumerate(range(*some.indices(run.windows))):
            judges = window % _HELD_OUT == _HELD_OUT - 1 or window == last < _HELD_OUT
            missing = (aim[at] - output[at]) / counts
            both[judges].add(inputs[at] * weights[at], missing * weights[at])
    return both[0], both[1]


def _counting(sizes: torch.Tensor) -> torch.Tensor:
    """Return the factor of each token, [windows, length] like their ``sizes``."""
    massive = sizes > _MASSIVE * sizes.median()
    few = int(massive.sum())
    times = torch.where(massive, math.sqrt((sizes.numel() - few) / max(few, 1)), 1.0)
    return times / sizes.clamp_min(1e-6)
