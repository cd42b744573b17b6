"""Which layer a training broke at: the first that makes numbers which are not finite of ones that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.models.hooks import removed_on_exit
from compress.stages.training.processes import first_found
from compress.utils.errors import StageError


class NotFiniteError(StageError):
    """A loss or a gradient became infinite or NaN."""


def blamed(module: nn.Module, losses: Callable[[], list[torch.Tensor]]) -> str:
    """`; the first ... is in LAYER`, seen as ``losses`` are computed again, forwards and then backwards.

    Empty where it doesn't come again, as by dropout. Gradients are left at zero. Of several processes all say what the
    first saw that saw anything: none may go on to where the others wait for it.
    """
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(part: nn.Module, given: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if not bad and isinstance(output, torch.Tensor) and not _finite(output):
                bad.append(name)

        return look

    leaves = {name: part for name, part in module.named_modules() if name and not any(part.children())}
    broken = first_found(next((name for name, value in module.named_parameters() if not _finite(value)), None))
    if broken is not None:
        return f"; the weight {broken} is not finite"
    with removed_on_exit(part.register_forward_hook(watch(name)) for name, part in leaves.items()):
        found = losses()
    layer = first_found(bad[0] if bad else None)
    if layer is not None:
        return f"; the first layer whose outputs are not finite is {layer}"
    torch.autograd.backward([one for one in found if _finite(one)])
    # A gradient goes back from the last layer, which is the first that shows it.
    slopes = [name for name, value in module.named_parameters() if value.grad is not None and not _finite(value.grad)]
    module.zero_grad()
    layer = first_found(slopes[-1].rpartition(".")[0] if slopes else None)
    return "" if layer is None else f"; the last layer whose gradient is not finite is {layer}"


def _finite(tensor: torch.Tensor) -> bool:
    # Of a weight that processes share each sees its own part.
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
