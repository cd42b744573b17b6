"""A folder of a draft head, and what such a head listens to. Importing this imports no torch."""

from __future__ import annotations

from typing import ClassVar

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import StageError

FEWEST_BLOCKS = 10
"""Of a model, so that an early, a middle and a late one are three."""


class HeadCheckpoint(Checkpoint):
    """A folder of a draft head. It is no model, and no stage goes on with it but those that ship it beside one."""

    kind: ClassVar[str] = "draft_head"


def heard_blocks(count: int) -> tuple[int, int, int]:
    """The blocks of so many whose outputs the head is given, as openvino-genai has it.

    The authors' code has the same numbers, and takes what goes into these blocks.

    Raises `StageError` for a model with too few.
    """
    if count < FEWEST_BLOCKS:
        raise StageError(
            f"A model of {count} blocks has no early, middle and late one for a draft head to listen to.",
            where="eagle3",
            expected=f"at least {FEWEST_BLOCKS} blocks",
            mend="make a draft of another kind: a model with fewer bits",
        )
    return 2, count // 2, count - 3
