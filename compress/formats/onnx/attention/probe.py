"""Whether a model's attention can be plugged: one forward that looks at every call, and must answer as before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.formats.onnx.attention.plug import Plug, by_definition, plugged
from compress.formats.prove import mixed_batches
from compress.tasks.forward import answers, tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAME = 1e-4
"""Of the largest answer: sums in another order differ by less."""


@dataclass(frozen=True)
class Probed:
    """Of each call in one forward why it stays as the model computes it, or nothing; masks are always plugged.

    ``refused`` says why nothing is plugged.
    """

    calls: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def unfused(self) -> tuple[str, ...]:
        """Why calls, or all attention, stay as the model computes them."""
        found = [self.refused, *self.calls]
        if not self.refused and not self.calls:
            found.append("the model computes it past transformers' interface, in a form that isn't known")
        return tuple(dict.fromkeys(reason for reason in found if reason))


def probe(module: PreTrainedModel, examples: Examples) -> Probed:
    """Run a padded batch of ``examples`` with attention as it is, and by the operator's definition, and compare."""
    batch = tensors(examples, mixed_batches(examples)[0])
    inputs = {name: value for name, value in batch.items() if name in examples.padding}
    plug = Plug(by_definition)
    with torch.no_grad():
        expected = answers(examples, module(**inputs), batch)
        try:
            with plugged(module, plug):
                found = answers(examples, module(**inputs), batch)
        except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return Probed(refused=f"it fails with an attention of ours: {' '.join(str(error).split())[:120]}")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= _SAME:
        return Probed(refused=f"it answers otherwise with an attention of ours, by {difference:.1e} of the largest")
    return Probed(tuple(plug.calls))
