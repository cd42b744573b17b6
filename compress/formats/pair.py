"""A model and its draft, held to what speculative decoding promises: the model's own tokens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.processor import load_tokenizer
from compress.errors import StageError

if TYPE_CHECKING:
    from compress.runtimes.decoder import GreedyDecoder
    from compress.runtimes.drafted import DraftedDecoder
    from compress.stage.stage import Context

_BEGINNINGS, _ROWS = 8, 32
_GIVEN, WRITTEN = 32, 48
"""Tokens of each beginning, and behind it."""


def check_tokens(target: Path, draft: Path) -> None:
    """Raise `StageError` where a draft's tokens are not the target's."""
    one, other = (load_tokenizer(folder).get_vocab() for folder in (target, draft))
    if one == other:
        return
    strange = sum(one.get(token) != number for token, number in other.items())
    raise StageError(
        f"{strange or len(one) - len(other)} of the draft's {len(other)} tokens are not those of the model.",
        where="draft_of",
        expected="the same tokens with the same ids",
        mend="cut and teach the draft without trim_vocabulary, or draft for a stage behind it",
    )


def checkpoint_of(label: str, context: Context) -> Checkpoint:
    """What an earlier stage gave, as files."""
    folder = context.scratch / "target"
    folder.mkdir(parents=True, exist_ok=True)
    context.earlier(label).save(folder)
    return Checkpoint(folder)


def prove_pair(alone: GreedyDecoder, pair: DraftedDecoder, folder: Path, context: Context) -> str:
    """Go on with a few texts, alone and by the pair, and say how many come out the same and what was accepted.

    ``folder`` has the tokenizer. Read several at once, a token's logits differ by rounding from those of a token read
    alone, in llama.cpp as elsewhere, so that two that are as likely may change places.
    """
    begun, same = beginnings(folder, context), 0
    for ids in context.progress.track(begun, "the pair writes", len(begun)):
        same += _continued(alone, ids) == _continued(pair, ids)
    return told(len(begun), same, pair.drafted, pair.accepted, pair.readings)


def beginnings(folder: Path, context: Context) -> list[list[int]]:
    """A few of the text's, as the tokenizer in ``folder`` has them; none where it is too short."""
    rows = context.data.split("train").slice(0, _ROWS)
    windows = context.task.encode(rows, load_tokenizer(folder), None, _GIVEN).inputs
    return [window["input_ids"].tolist() for window in islice(windows, _BEGINNINGS)]


def told(count: int, same: int, drafted: int, accepted: int, readings: int) -> str:
    """What came of so many beginnings, each gone on with by `WRITTEN` tokens."""
    if not count:
        return f"draft: what the pair writes was not looked at: the text has fewer than {_GIVEN} tokens"
    return (
        f"draft: the pair writes what the model alone writes behind {same} of {count} beginnings; {accepted} of "
        f"{drafted} drafted tokens are accepted, {count * (WRITTEN - 1) / max(readings, 1):.1f} tokens a reading"
    )


def _continued(decoder: GreedyDecoder, ids: list[int]) -> list[int]:
    found = [decoder.prefill(ids)]
    while len(found) < WRITTEN:
        found.append(decoder.step(found[-1]))
    return found
