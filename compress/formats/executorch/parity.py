"""Proof that an ExecuTorch program computes what the torch model computes, and how far 8 bits take it away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.errors import IntegrityError
from compress.formats.executorch.export import Lowered
from compress.formats.executorch.runtime import open_bytes
from compress.formats.onnx.parity import mixed_batches
from compress.tasks.forward import answers, tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel


def prove_near(made: Lowered, model: TorchModel, examples: Examples, tolerance: float) -> str:
    """What to tell of a program, on padded batches and a single example. Raises `IntegrityError`.

    In fp32 it may differ from torch by ``tolerance``. In 8 bits an input that lies between two integers may be rounded
    either way, so that it may be as far again from torch over the same integers as these are from the float model.
    """
    session = open_bytes(made.model, threads=1)
    names = tuple(session.inputs)
    apart = near = largest = 0.0
    for indices in mixed_batches(examples):
        batch, inputs = examples.batch(indices), tensors(examples, indices)
        given = {name: inputs[name] for name in names}
        with torch.inference_mode():
            expected = answers(examples, model.module.eval()(**given), inputs).numpy()
            found = {name: made.source(*given.values()) for name in session.output_types}
            same = answers(examples, SimpleNamespace(**found), inputs).numpy()
        shipped = examples.answers(session.predict(batch), batch)
        largest = max(largest, float(np.abs(expected).max()))
        # Unlike max, numpy's maximum does not lose a NaN.
        apart = float(np.maximum(apart, np.abs(same - expected).max()))
        near = float(np.maximum(near, np.abs(shipped - same).max()))
    if not near <= apart + tolerance:
        raise IntegrityError(
            f"In ExecuTorch the {examples.answers_are} differ from torch by {near:.2e}.",
            expected=f"at most {apart + tolerance:g} on padded batches",
            mend="raise tolerance if the difference is acceptable",
        )
    if apart <= tolerance:
        return f"{examples.answers_are} differ by at most {near:.1e} from torch"
    return (
        f"{examples.answers_are} differ by at most {near:.1e} from torch over the same integers, which are {apart:.1e} "
        f"from the float model, where the largest is {largest:.1f}"
    )
