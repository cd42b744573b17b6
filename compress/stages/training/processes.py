"""Several processes on one recipe, as `torchrun` or `accelerate launch` start them: all train, the first one writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from compress.utils.torch_device import CPU, current_device

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Found = TypeVar("Found")


def num_processes() -> int:
    """Return how many processes a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that writes, measures and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def is_mine(place: int) -> bool:
    """Return whether this process does item ``place`` of work that processes share."""
    return place % num_processes() == int(os.environ.get("RANK", "0"))


def together(found: dict[int, Found]) -> dict[int, Found]:
    """Return every process's ``found`` in every process."""
    if num_processes() == 1:
        return found
    from accelerate.utils import gather_object

    accelerator()
    merged: dict[int, Found] = {}
    for part in gather_object([found]):
        merged |= part
    return merged


def own_device(device: str) -> str:
    """Return the device of this process where several share a machine: each has a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device.startswith("cuda") else device


def accelerator(split_batches: bool = False) -> Accelerator:
    """Return the process's accelerator, on the device that stages compute on; each process has its own GPU.

    ``split_batches``: each process gets its part of every batch, rather than batches of its own.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DataLoaderConfiguration

    on_cpu = current_device() == CPU
    # What was chosen first stays accelerate's for the whole process, which may run another recipe by now.
    if PartialState._shared_state and (PartialState().device.type == CPU) != on_cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=on_cpu, dataloader_config=DataLoaderConfiguration(split_batches=split_batches))


def mean(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes."""
    if num_processes() == 1:
        return value
    from accelerate.utils import reduce

    average: torch.Tensor = reduce(value, "mean")
    return average


def wait_for_all() -> None:
    """Return once every process has come here."""
    if num_processes() > 1:
        accelerator().wait_for_everyone()


def first_says(value: bool) -> bool:
    """Return the first process's ``value`` in every process."""
    if num_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    accelerator()
    (answer,) = broadcast_object_list([value])
    return bool(answer)
