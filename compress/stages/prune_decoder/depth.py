"""Whole blocks of a decoder taken out: which of them, by what they do to hidden states, or by the loss without them.

Blocks are read from the checkpoint one at a time, and what is left is copied under its new number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from compress.models.checkpoint import Checkpoint
from compress.models.hooks import capture_inputs, capture_outputs, removed_on_exit
from compress.models.structure import blocks
from compress.models.transformer_pruning import keep_layers
from compress.numerics.pruning import RegressionSums, solve
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import BlockRun, CalibrationActivations
from compress.stages.blockwise.write import config_changes, write_pruned
from compress.stages.gptq.settings import Quantization
from compress.stages.prune_decoder.settings import DecoderPruning
from compress.utils.errors import StageError
from compress.utils.progress import Progress
from compress.utils.torch_device import autocast, current_device, device_memory_errors

_HELD_OUT = 8
"""One of so many windows judges what the others were solved on."""
_MASSIVE = 10
"""So many times as large as the median token's states are massive ones."""
_APART = 0.05
"""What a block gives less without a layer's output is that output times a number, but for this share at most."""


@torch.no_grad()
def compensate_removed_blocks(
    stream: CalibrationActivations, gap: range, damping: float, context: Context
) -> dict[str, torch.Tensor]:
    """Return the layer that compensates for the removed blocks ``gap``: its tensors by name, as laid out in the files.

    Nothing is returned, with a remark, where the block before the gap has no supported feed-forward layers or
    norms their outputs, and where the sequences are too few or say nothing of others.
    """
    if gap.start == 0:
        return {}
    decoder, block_before = stream.decoder, gap.start - 1
    what = f"prune_decoder: compensating for blocks {gap.start} to {gap.stop - 1}"
    # Pass the text up to the end of the gap, and keep the states that enter the block before the gap.
    for index in context.progress.track(range(gap.stop), what, gap.stop):
        with device_memory_errors(f"prune_decoder: {decoder.prefix}.{index}", "samples or sequence_length"):
            decoder.load(index)
            stream.pass_as_it_is(index)
            if index != block_before:
                stream.forget(index)
            decoder.unload(index)
    with device_memory_errors(f"prune_decoder: {decoder.prefix}.{block_before}", "samples or sequence_length"):
        decoder.load(block_before)
        run = BlockRun.of(decoder, stream.config, block_before, stream.ids)
        solved = _Compensation(stream, damping, context).solve(run, gap)
        decoder.unload(block_before)
    stream.forget(block_before)
    stream.forget(gap.stop)
    return solved


@dataclass
class _Compensation:
    stream: CalibrationActivations
    damping: float
    context: Context

    def solve(self, run: BlockRun, gap: range) -> dict[str, torch.Tensor]:
        """Solve the last layer of the loaded block in place, and return it as laid out in the files, or nothing."""
        warning = f"prune_decoder: nothing compensates for blocks {gap.start} to {gap.stop - 1}"
        decoder, states = self.stream.decoder, self.stream.entering(run.index)
        block = blocks(decoder.model)[run.index]
        layer = None if block.feed_forward is None else block.feed_forward.output
        if not isinstance(layer, nn.Linear):
            self.context.note(f"{warning}: {block.name} has no supported feed-forward layers")
            return {}
        if len(self.stream.ids) < 2:
            self.context.note(f"{warning}: one window (samples) leaves none for validation")
            return {}
        counts = _share(run, states[run.slices()[0]], layer)
        name = decoder.name(layer)
        if counts is None:
            self.context.note(f"{warning}: the output of {name} is not added unchanged to the hidden states")
            return {}
        with autocast(False, decoder.device):
            # Regression sums of ``layer``'s inputs and missing outputs, for sequences to solve on and to judge by.
            target = self.stream.entering(gap.stop)
            rows, columns = layer.weight.shape
            both = tuple(RegressionSums.none(columns, rows, layer.weight.device) for _ in range(2))
            counting = _counting(torch.cat([target[some].square().mean(dim=-1).sqrt() for some in run.slices()]))
            seen: list[torch.Tensor] = []
            last = run.windows - 1
            for some in run.slices():
                with capture_inputs({"": layer}, lambda _, inputs: seen.append(inputs.float())):
                    output = run(states[some]).float()
                aim = target[some]
                inputs = seen.pop().reshape(*aim.shape[:2], columns)
                weights = counting[some].unsqueeze(-1)
                for at, window in enumerate(range(*some.indices(run.windows))):
                    judges = window % _HELD_OUT == _HELD_OUT - 1 or window == last < _HELD_OUT
                    missing = (aim[at] - output[at]) / counts
                    both[judges].add(inputs[at] * weights[at], missing * weights[at])
            fitted, held_out = (both[0], both[1])
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
            self.context.note(f"{warning}: what {name} fits on some windows does not generalize to others (samples)")
            return {}
        layer.weight = nn.Parameter(decoder.rounded(name, layer.weight + change.T), requires_grad=False)
        self.context.note(
            f"prune_decoder: {name} compensates for blocks {gap.start} to {gap.stop - 1}: {left:.0%} of the change "
            "remains, in sequences that it was not solved on"
        )
        return dict(decoder.as_stored(name, layer))


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


def _counting(sizes: torch.Tensor) -> torch.Tensor:
    """Return the factor of each token, [windows, length] like their ``sizes``."""
    massive = sizes > _MASSIVE * sizes.median()
    few = int(massive.sum())
    times = torch.where(massive, math.sqrt((sizes.numel() - few) / max(few, 1)), 1.0)
    return times / sizes.clamp_min(1e-6)


def remove_blocks(
    checkpoint: Checkpoint, settings: DecoderPruning, text: Quantization, ids: torch.Tensor | None, context: Context
) -> Checkpoint:
    """Remove ``settings.layers`` decoder blocks and write the remaining checkpoint.

    Args:
        checkpoint: Model to prune.
        settings: Number of blocks, and how they are chosen.
        text: Settings of the calibration text.
        ids: Tokens of the calibration text, [windows, length]. Without them the last blocks are removed.
        context: Data and folders of the stage.

    Raises:
        StageError: No block would be left, or the config cannot describe which ones are.
    """
    decoder = build_blockwise_model(checkpoint, current_device())
    total, count = len(decoder.blocks), settings.layers
    check_removal(total, count)
    gone, fitted = range(total - count, total), dict[str, torch.Tensor]()
    if ids is not None:
        gone = _nearest(decoder, count, text, ids, context)
        names = f"block{'s'[: count > 1]} {', '.join(map(str, gone))}"
        context.note(f"prune_decoder: {names if count < 3 else f'blocks {gone[0]} to {gone[-1]}'} of {total} removed")
    remaining_blocks = [index for index in range(total) if index not in gone]
    changes = config_changes(checkpoint.folder, lambda module: keep_layers(module, remaining_blocks))
    if ids is not None:
        folder = context.scratch / "compensation"
        folder.mkdir(parents=True, exist_ok=True)
        stream = CalibrationActivations(decoder, text, ids, folder)
        fitted = compensate_removed_blocks(stream, gone, settings.damp_percent, context)
    return write_pruned(checkpoint, context.scratch / "blocks", changes, _renumbered(decoder, remaining_blocks, fitted))


def check_removal(total: int, count: int) -> None:
    """Raise `StageError` where no block would be left."""
    if count >= total:
        raise StageError(
            f"prune_decoder removes {count} of {total} blocks, which leaves none.",
            where="prune_decoder.layers",
            expected=f"at most {total - 1}",
        )


def _renumbered(
    decoder: BlockwiseModel, kept: Sequence[int], fitted: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that stays, those of the blocks in ``kept`` by their new numbers; ``fitted`` are others."""
    places = {old: new for new, old in enumerate(kept)}
    of_block = re.compile(rf"{re.escape(decoder.prefix)}\.(\d+)\.(.+)")
    for name in decoder.checkpoint.files:
        match = of_block.fullmatch(name)
        if match is not None and int(match[1]) not in places:
            continue
        stored = decoder.checkpoint.stored(name)
        stored = fitted[name].contiguous().to(stored) if name in fitted else stored
        yield name if match is None else f"{decoder.prefix}.{places[int(match[1])]}.{match[2]}", stored


def _nearest(decoder: BlockwiseModel, count: int, text: Quantization, ids: torch.Tensor, context: Context) -> range:
    """Return the ``count`` consecutive blocks that together change hidden states least.

    Args:
        decoder: Model to prune.
        count: Number of blocks.
        text: Settings of the calibration text.
        ids: Tokens of the calibration text, [windows, length].
        context: Context of the stage, whose report gets a table of the distances.
    """
    block_distances = distances(decoder, text, ids, count, context.scratch / "influence", context.progress)
    context.add_table(f"Runs of {count} blocks", ("first block", "distance"), enumerate(block_distances))
    first = min(range(len(block_distances)), key=lambda index: (block_distances[index], index))
    return range(first, first + count)


@torch.no_grad()
def distances(
    decoder: BlockwiseModel, text: Quantization, ids: torch.Tensor, span: int, folder: Path, progress: Progress
) -> list[float]:
    """1 - the mean cosine of the hidden states that enter a block and those that leave the last of ``span`` from it on.

    For each block that has so many. Of one block that is its influence (Men et al. 2024, section 3); of several it
    ranks as the angular distance does (Gromov et al. 2024, figure 1). Over all tokens of ``ids`` [windows, length];
    states lie in ``folder``, one block is in memory at a time. Raises `StageError` for states that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream, results = CalibrationActivations(decoder, text, ids, folder), list[float]()
    block_indices = range(len(decoder.blocks))
    for index in progress.track(block_indices, "prune_decoder: block influence", len(block_indices)):
        with device_memory_errors(f"prune_decoder: {decoder.prefix}.{index}", "samples or sequence_length"):
            decoder.load(index)
            stream.pass_as_it_is(index)
            decoder.unload(index)
        first = index + 1 - span
        if first >= 0:
            # The cosine at each token of the states that enter the first block and those that leave the last.
            pairs = (
                (stream.entering(first)[window], stream.entering(index + 1)[window])
                for window in (slice(at, at + 1) for at in range(len(ids)))
            )
            likeness = sum(float(cosine_similarity(*pair, dim=-1).double().sum()) for pair in pairs)
            results.append(_finite(1 - likeness / ids.numel(), f"what leaves {decoder.prefix}.{index}"))
            stream.forget(first)
    for index in range(len(block_indices) + 1 - span, len(block_indices) + 1):
        stream.forget(index)
    return results


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise StageError(
            f"On the calibration text {what} is not finite.",
            expected="a model that computes finite numbers there",
            hint="set precision: fp32",
        )
    return value
