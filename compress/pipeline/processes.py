"""Several processes on one recipe, as `accelerate launch` starts them: all train, the first one keeps the files."""

from __future__ import annotations

import os


def several() -> bool:
    """Whether a launcher started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the process that writes, measures and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    if several():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def first_says(value: bool) -> bool:
    """The first process's ``value``, in every process."""
    if not several():
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState()
    (said,) = broadcast_object_list([value])
    return bool(said)
