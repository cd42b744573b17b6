"""Whole blocks of a decoder taken out: which of them, by what they do to hidden states, or by the loss without them.

Blocks are read from the checkpoint one at a time, and what is left is copied under its new number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from compress.models.checkpoint import Checkpoint
from compress.models.hooks import capture_inputs, capture_outputs, removed_on_exit
from compress.models.structure import TransformerBlock, blocks
from compress.models.transformer_pruning import keep_layers
from compress.numerics.pruning import RegressionSums, solve
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import BlockRun, CalibrationActivations, States
from compress.stages.blockwise.write import cached_json, config_changes, write_pruned
from compress.stages.gptq.settings import Quantization
from compress.stages.prune_decoder.settings import DecoderPruning
from compress.utils.errors import StageError
from compress.utils.progress import Progress
from compress.utils.torch_device import autocast, current_device, device_memory_errors, device_uses_bf16

_HELD_OUT = 8
"""One of so many windows judges what the others were solved on."""
_MASSIVE = 10
"""So many times as large as the median token's states are massive ones."""
_APART = 0.05
"""What a block gives less without a layer's output is that output times a number, but for this share at most."""


def gaps(gone: Collection[int]) -> list[range]:
    """Neighbours among the blocks that go, ascending."""
    ordered = sorted(gone)
    starts = [index for index in ordered if index - 1 not in gone]
    ends = [index + 1 for index in ordered if index + 1 not in gone]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def compensate_removed_blocks(
    stream: CalibrationActivations, gone: Collection[int], damping: float, context: Context
) -> dict[str, torch.Tensor]:
    """Return the layers that compensate for the removed blocks ``gone``: tensors by name, as laid out in the files.

    A gap is left as it is, with a remark, where nothing is before it, where the block there has no feed-forward layers
    that are known or norms what they give, and where the windows are too few or say nothing of others.
    """
    work, tensors = _Work(stream, damping, context), dict[str, torch.Tensor]()
    cut, at = stream, 0  # the cut model's states are the whole one's up to the first gap
    every = gaps(gone)
    for gap in every:
        cut, solved = work.pass_gap(cut, at, gap, goes_on=gap != every[-1])
        tensors, at = tensors | solved, gap.stop
    stream.forget(at)
    return tensors


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
        block_before, behind = gap.start - 1, self.whole.as_float("cut")
        streams = [self.whole] if cut is self.whole else [self.whole, cut]
        what = f"prune_decoder: compensating for blocks {gap.start} to {gap.stop - 1}"
        for index in self.context.progress.track(range(at, gap.stop), what, gap.stop - at):
            with device_memory_errors(f"prune_decoder: {self.decoder.prefix}.{index}", "samples or sequence_length"):
                self.decoder.load(index)
                for stream in streams if index < block_before else [self.whole]:
                    stream.pass_as_it_is(index)
                    if index != block_before:
                        stream.forget(index)
                self.decoder.unload(index)
        if block_before < 0:
            if goes_on:
                embedded = (self.decoder.embedded(row) for row in torch.split(self.whole.ids, 1))
                behind.entering(gap.stop).write(embedded)
            return behind, {}
        with device_memory_errors(f"prune_decoder: {self.decoder.prefix}.{block_before}", "samples or sequence_length"):
            self.decoder.load(block_before)
            run = BlockRun.of(self.decoder, self.whole.config, block_before, self.whole.ids)
            states = cut.entering(block_before)
            solved = self._solved(run, states, gap)
            if goes_on:
                behind.entering(gap.stop).write(run(states[some]) for some in run.slices())
            self.decoder.unload(block_before)
        for stream in streams:
            stream.forget(block_before)
        return behind, solved

    def _solved(self, run: BlockRun, states: States, gap: range) -> dict[str, torch.Tensor]:
        """Solve the last layer of the loaded block in place, and return it as laid out in the files, or nothing."""
        warning = f"prune_decoder: nothing compensates for blocks {gap.start} to {gap.stop - 1}"
        block = self.blocks[run.index]
        layer = None if block.feed_forward is None else block.feed_forward.output
        if not isinstance(layer, nn.Linear):
            self.context.note(f"{warning}: {block.name} has no feed-forward layers that are known")
            return {}
        if len(self.whole.ids) < 2:
            self.context.note(f"{warning}: of one window (samples) none is left to judge by")
            return {}
        counts = _share(run, states[run.slices()[0]], layer)
        name = self.decoder.name(layer)
        if counts is None:
            self.context.note(f"{warning}: what {name} gives is not added to the states as it is")
            return {}
        with autocast(False, self.decoder.device):
            # Regression sums of ``layer``'s inputs and missing outputs, for sequences to solve on and to judge by.
            target = self.whole.entering(gap.stop)
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
            self.context.note(f"{warning}: what {name} learns of some windows does not help in others (samples)")
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


def _counting(sizes: torch.Tensor) -> torch.Tensor:
    """Return the factor of each token, [windows, length] like their ``sizes``."""
    massive = sizes > _MASSIVE * sizes.median()
    few = int(massive.sum())
    times = torch.where(massive, math.sqrt((sizes.numel() - few) / max(few, 1)), 1.0)
    return times / sizes.clamp_min(1e-6)


STATES_BYTES = 1 << 28
"""Of the hidden states of all trials that pass a block together; the text is cut into batches that keep to it."""


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
    gone, fitted = [*range(total - count, total)], dict[str, torch.Tensor]()
    if ids is not None:
        gone = (_greedily if settings.layer_importance == "greedy" else _nearest)(decoder, settings, text, ids, context)
        # Blocks by their numbers, in the order in which they were chosen where that is another.
        order = "" if gone == sorted(gone) else ", in the order in which they were chosen,"
        names = f"block{'s'[: count > 1]} {', '.join(map(str, gone))}{order}"
        if count > 2 and gone == [*range(gone[0], gone[0] + count)]:
            names = f"blocks {gone[0]} to {gone[-1]}"
        context.note(f"prune_decoder: {names} of {total} removed")
    remaining_blocks = [index for index in range(total) if index not in gone]
    changes = config_changes(checkpoint.folder, lambda module: keep_layers(module, remaining_blocks))
    if ids is not None and settings.compensate:
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


def _nearest(
    decoder: BlockwiseModel, settings: DecoderPruning, text: Quantization, ids: torch.Tensor, context: Context
) -> list[int]:
    """Return the blocks that change hidden states least, one by one or as neighbours."""
    count, one_by_one = settings.layers, settings.layer_importance == "block_influence"
    span = 1 if one_by_one else count
    block_distances = distances(decoder, text, ids, span, context.scratch / "influence", context.progress)
    title, columns = f"Runs of {count} blocks", ("first block", "distance")
    if one_by_one:
        title, columns = "Block influence", ("block", "influence")
    context.add_table(title, columns, enumerate(block_distances))
    order = sorted(range(len(block_distances)), key=lambda index: (block_distances[index], index))
    return order[:count] if one_by_one else [*range(order[0], order[0] + count)]


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


def _greedily(
    decoder: BlockwiseModel, settings: DecoderPruning, text: Quantization, ids: torch.Tensor, context: Context
) -> list[int]:
    """Blocks in the order of their removal; a killed run goes on with the next one."""
    path, count = context.scratch / "removed.json", settings.layers
    rounds: list[dict[str, float]] = json.loads(path.read_text()) if path.is_file() else []
    gone = [_best(losses) for losses in rounds]
    for _ in context.progress.track(range(len(gone), count), "prune_decoder: blocks", count - len(gone)):
        remaining = [index for index in range(len(decoder.blocks)) if index not in gone]
        trials = f"prune_decoder: a trial without each of {len(remaining)} blocks"
        with device_memory_errors(trials, "samples or sequence_length"):
            losses = losses_without(decoder, text, ids, remaining)
        rounds.append({str(index): loss for index, loss in losses.items()})
        cached_json(path, rounds)
        gone.append(_best(rounds[-1]))
        context.progress.note(f"prune_decoder: without block {gone[-1]} too, the loss is {losses[gone[-1]]:.4f}")
    rows = [(round_index + 1, index, rounds[round_index][str(index)]) for round_index, index in enumerate(gone)]
    context.add_table("Blocks removed", ("order", "block", "loss without it"), rows)
    return gone


def _best(losses: dict[str, float]) -> int:
    return min(map(int, losses), key=lambda index: (losses[str(index)], index))


@torch.no_grad()
def losses_without(
    decoder: BlockwiseModel, text: Quantization, ids: torch.Tensor, kept: Sequence[int]
) -> dict[int, float]:
    """Return the mean loss on ``ids`` [windows, length] of the blocks ``kept``, without each of them in turn.

    The hidden states that enter a block are where the trial without it begins, so that a trial costs its tail alone,
    and all trials that have begun pass a block while it is in memory. Raises `StageError` for a loss that isn't finite.
    """
    window = 4 * decoder.hidden_size * ids.shape[1] * (len(kept) + 1)
    bf16, totals = device_uses_bf16(text.precision, decoder.device), dict.fromkeys(kept, 0.0)
    for some in torch.split(ids, max(STATES_BYTES // window, 1)):
        calls, trials, whole = decoder.calls(some), dict[int, torch.Tensor](), decoder.embedded(some)
        for index in kept:
            decoder.load(index)
            with autocast(bf16, decoder.device):
                passed = {trial: decoder.run(index, hidden, calls[index]).float() for trial, hidden in trials.items()}
                trials = passed | {index: whole}
                whole = decoder.run(index, whole, calls[index]).float() if index != kept[-1] else whole
            decoder.unload(index)
        for trial, hidden in trials.items():
            for row, tokens in enumerate(some):
                logits = decoder.logits(hidden[row : row + 1])[0, :-1]
                totals[trial] += float(cross_entropy(logits.float(), tokens[1:].to(logits.device)))
    return {
        index: _finite(total / len(ids), f"the loss without {decoder.prefix}.{index}")
        for index, total in totals.items()
    }


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise StageError(
            f"On the calibration text {what} is not finite.",
            expected="a model that computes finite numbers there",
            hint="set precision: fp32",
        )
    return value
