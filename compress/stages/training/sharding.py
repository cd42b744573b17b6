"""A model of which each process keeps a part: fully sharded data parallelism, by torch's own `fully_shard`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from compress.stages.training import processes
from compress.utils.torch_device import CPU

Module = TypeVar("Module", bound=nn.Module)


def is_sharded(module: nn.Module) -> bool:
    """Return whether each process holds only a part of the module's weights."""
    return hasattr(module, "reshard")  # FSDPModule's, whose import takes a second


class Sharded(Generic[Module]):
    """A copy of a module whose weights lie in parts with all processes; the module itself is empty meanwhile.

    A block's weights are whole while it computes, and let go then (Rajbhandari et al. 2020, ZeRO, stage 3). Each of
    ``blocks`` is gathered alone. What lies outside of them, such as tables of words, is gathered by the module's own
    forward pass, or within `whole`; with ``apart=False``, for a module that learns nothing, it is never in parts.
    """

    def __init__(self, module: Module, blocks: list[nn.Module], apart: bool = True) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._whole = module
        copies: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
        self.module: Module = copy.deepcopy(module, copies)
        device = processes.accelerator().device
        mesh = init_device_mesh(device.type, (processes.count(),))
        for block in blocks:
            fully_shard(copies[id(block)], mesh=mesh)
        if apart:
            fully_shard(self.module, mesh=mesh)
        else:
            self.module.to(device)
        still = {id(parameter) for parameter in self.module.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in still:
                parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the weights outside of all blocks, so that parts of the module can be called alone."""
        root: Any = self.module
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the module, on the processor, the weights as they are now; every process calls it."""
        mine = dict(self.module.named_parameters())
        for name, parameter in self._whole.named_parameters():
            parameter.data = gathered(mine[name]).to(CPU)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be distributed over all processes; all of them call it."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
