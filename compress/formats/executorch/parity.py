"""Proof that an ExecuTorch program computes what the torch model computes, and how far 8 bits take it away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compress.formats.executorch.export import Lowered
from compress.formats.executorch.runtime import open_bytes
from compress.formats.prove import measure, of_session, of_torch, prove
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel


def prove_lowered(made: Lowered, model: TorchModel, examples: Examples, tolerance: float) -> str:
    """What to tell of a program, on padded batches and a single example. Raises `IntegrityError`.

    In fp32 it may differ from torch by ``tolerance``. In 8 bits an input that lies between two integers may be rounded
    either way, so that it may be as far again from torch over the same integers as these are from the float model.
    """
    session = open_bytes(made.model, threads=1)
    integers = of_torch(_ByName(made, tuple(session.inputs), tuple(session.output_types)), examples)
    apart = measure(of_torch(model.module, examples), integers, examples)
    words, allowed = examples.answers_are, apart.worst + tolerance
    what = f"In ExecuTorch the {words} differ from torch"
    near = prove(integers, of_session(session, examples), examples, allowed, what)
    if apart.worst <= tolerance:
        return f"{words} differ by at most {near.worst:.1e} from torch"
    return (
        f"{words} differ by at most {near.worst:.1e} from torch over the same integers, which are {apart.worst:.1e} "
        f"from the float model, where the largest is {apart.largest:.1f}"
    )


class _ByName:
    """What a program was made of, called as the model that it stands for is."""

    def __init__(self, made: Lowered, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self._made, self._inputs, self._outputs = made, inputs, outputs

    def eval(self) -> _ByName:
        return self

    def __call__(self, **values: Any) -> Any:
        given = [values[name] for name in self._inputs]
        return SimpleNamespace(**{name: self._made.source(*given) for name in self._outputs})
