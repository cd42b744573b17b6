"""Several processes on one recipe, as `torchrun` or `accelerate launch` start them: all train, the first one writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def several() -> bool:
    """Whether a launcher started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the process that writes, measures and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def accelerator(split_batches: bool = False) -> Accelerator:
    """The process's accelerator; processes without a GPU train together on the CPU only if accelerate is told so.

    ``split_batches``: each process gets its part of every batch, rather than batches of its own.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerator(
        cpu=several() and not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if not several():
        return value
    from accelerate.utils import reduce

    found: torch.Tensor = reduce(value, "mean")
    return found


def wait_for_all() -> None:
    """Return once every process has come here."""
    if several():
        accelerator().wait_for_everyone()


def first_says(value: bool) -> bool:
    """The first process's ``value``, in every process."""
    if not several():
        return value
    from accelerate.utils import broadcast_object_list

    accelerator()
    (said,) = broadcast_object_list([value])
    return bool(said)
