"""Whole blocks of a decoder taken out: which of them, by what they do to hidden states, or by the loss without them.

Blocks are read from the checkpoint one at a time, and what is left is copied under its new number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from compress.models.checkpoint import Checkpoint
from compress.models.transformer_pruning import keep_layers
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.build import build_blockwise_model
from compress.stages.blockwise.calibration_activations import CalibrationActivations
from compress.stages.blockwise.pruned_checkpoint import cached_json, config_changes, write_pruned
from compress.stages.gptq.settings import Quantization
from compress.stages.prune_decoder.layer_replacement import compensate_removed_blocks
from compress.utils.errors import StageError
from compress.utils.torch_device import autocast, current_device, device_memory_errors, device_uses_bf16

if TYPE_CHECKING:
    from compress.stages.base import Context
    from compress.stages.prune_decoder.settings import DecoderPruning
    from compress.utils.progress import Progress


STATES_BYTES = 1 << 28
"""Of the hidden states of all trials that pass a block together; the text is cut into batches that keep to it."""


def remove_blocks(
    checkpoint: Checkpoint, settings: DecoderPruning, text: Quantization, ids: torch.Tensor | None, context: Context
) -> Checkpoint:
    """``settings.layers`` blocks fewer, chosen on token ``ids`` [windows, length]; without any the last ones go.

    Raises `StageError` where none would be left, and where the config cannot say which are.
    """
    decoder = build_blockwise_model(checkpoint, current_device())
    total, count = len(decoder.blocks), settings.layers
    check_removal(total, count)
    if ids is None:
        gone: Sequence[int] = range(total - count, total)
    else:
        gone = _CHOOSERS[settings.layer_importance](decoder, text, ids, count, context)
    kept = [index for index in range(total) if index not in gone]
    if ids is not None:
        context.note(f"prune_decoder: {_told(gone)} of {total} removed")
    changes = config_changes(checkpoint.folder, lambda module: keep_layers(module, kept))
    fitted = {}
    if ids is not None and settings.compensate:
        folder = context.scratch / "compensation"
        folder.mkdir(parents=True, exist_ok=True)
        fitted = compensate_removed_blocks(
            CalibrationActivations(decoder, text, ids, folder), gone, settings.damp_percent, context
        )
    return write_pruned(checkpoint, context.scratch / "blocks", changes, _renumbered(decoder, kept, fitted))


def _told(gone: Sequence[int]) -> str:
    """Blocks by their numbers, in the order in which they were chosen where that is another."""
    if len(gone) > 2 and list(gone) == list(range(gone[0], gone[0] + len(gone))):
        return f"blocks {gone[0]} to {gone[-1]}"
    order = "" if list(gone) == sorted(gone) else ", in the order in which they were chosen,"
    return f"block{'s'[: len(gone) > 1]} {', '.join(map(str, gone))}{order}"


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
        found = of_block.fullmatch(name)
        if found is not None and int(found[1]) not in places:
            continue
        stored = decoder.checkpoint.stored(name)
        stored = fitted[name].contiguous().to(stored) if name in fitted else stored
        yield name if found is None else f"{decoder.prefix}.{places[int(found[1])]}.{found[2]}", stored


def _by_influence(
    decoder: BlockwiseModel, text: Quantization, ids: torch.Tensor, count: int, context: Context
) -> list[int]:
    found = distances(decoder, text, ids, 1, context.scratch / "influence", context.progress)
    context.add_table("Block influence", ("block", "influence"), enumerate(found))
    return sorted(range(len(found)), key=lambda index: (found[index], index))[:count]


def _neighbours(
    decoder: BlockwiseModel, text: Quantization, ids: torch.Tensor, count: int, context: Context
) -> list[int]:
    found = distances(decoder, text, ids, count, context.scratch / "influence", context.progress)
    context.add_table(f"Runs of {count} blocks", ("first block", "distance"), enumerate(found))
    first = min(range(len(found)), key=lambda index: (found[index], index))
    return list(range(first, first + count))


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
    stream, found = CalibrationActivations(decoder, text, ids, folder), list[float]()
    rest = range(len(decoder.blocks))
    for index in progress.track(rest, "prune_decoder: block influence", len(rest)):
        with device_memory_errors(f"prune_decoder: {decoder.prefix}.{index}", "samples or sequence_length"):
            decoder.load(index)
            stream.pass_as_it_is(index)
            decoder.unload(index)
        first = index + 1 - span
        if first >= 0:
            likeness = sum(_likeness(stream, first, index + 1))
            found.append(_finite(1 - likeness / ids.numel(), f"what leaves {decoder.prefix}.{index}"))
            stream.forget(first)
    for index in range(len(rest) + 1 - span, len(rest) + 1):
        stream.forget(index)
    return found


def _likeness(stream: CalibrationActivations, first: int, second: int) -> Iterator[float]:
    """Yield for each sequence the sum over its tokens of the cosine of the states that enter the two blocks."""
    entering, left = stream.entering(first), stream.entering(second)
    for at in range(len(stream.ids)):
        window = slice(at, at + 1)
        yield float(cosine_similarity(entering[window], left[window], dim=-1).double().sum())


def _greedily(
    decoder: BlockwiseModel, text: Quantization, ids: torch.Tensor, count: int, context: Context
) -> list[int]:
    """Blocks in the order of their removal; a killed run goes on with the next one."""
    path = context.scratch / "removed.json"
    rounds: list[dict[str, float]] = json.loads(path.read_text()) if path.is_file() else []
    gone = [_best(losses) for losses in rounds]
    for _ in context.progress.track(range(len(gone), count), "prune_decoder: blocks", count - len(gone)):
        kept = [index for index in range(len(decoder.blocks)) if index not in gone]
        with device_memory_errors(
            f"prune_decoder: a trial without each of {len(kept)} blocks", "samples or sequence_length"
        ):
            losses = losses_without(decoder, text, ids, kept)
        rounds.append({str(index): loss for index, loss in losses.items()})
        cached_json(path, rounds)
        gone.append(_best(rounds[-1]))
        context.progress.note(f"prune_decoder: without block {gone[-1]} too, the loss is {losses[gone[-1]]:.4f}")
    rows = [(place + 1, index, rounds[place][str(index)]) for place, index in enumerate(gone)]
    context.add_table("Blocks removed", ("order", "block", "loss without it"), rows)
    return gone


def _best(losses: dict[str, float]) -> int:
    return min(map(int, losses), key=lambda index: (losses[str(index)], index))


_CHOOSERS = {"neighbours": _neighbours, "block_influence": _by_influence, "greedy": _greedily}


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
            for place, tokens in enumerate(some):
                logits = decoder.logits(hidden[place : place + 1])[0, :-1]
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
