"""Proof that a file answers through its runtime as the torch model does, and how far one of fewer bits is from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.errors import IntegrityError
from compress.formats.onnx.parity import mixed_batches
from compress.runtimes.runtime import Session
from compress.tasks.forward import answers, tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel


def prove_near(
    runtime: str, plain: Session, made: Session, model: TorchModel, examples: Examples, tolerance: float
) -> str:
    """What to tell of ``made``; ``plain`` is the same in fp32, and held to ``tolerance`` on padded and single batches.

    ``runtime`` is what both run in, in a word for people. Raises `IntegrityError`.
    """
    sessions = [plain] if made is plain else [plain, made]
    worst, largest = [0.0] * len(sessions), 0.0
    for indices in mixed_batches(examples):
        batch = examples.batch(indices)
        inputs = {name: value for name, value in tensors(examples, indices).items() if name in examples.padding}
        with torch.inference_mode():
            expected = answers(examples, model.module.eval()(**inputs), inputs).numpy()
        largest = max(largest, float(np.abs(expected).max()))
        for place, session in enumerate(sessions):
            difference = np.abs(examples.answers(session.predict(batch), batch) - expected).max()
            # Unlike max, numpy's maximum does not lose a NaN.
            worst[place] = float(np.maximum(worst[place], difference))
    if not worst[0] <= tolerance:
        raise IntegrityError(
            f"In {runtime} the {examples.answers_are} differ from torch by {worst[0]:.2e}.",
            expected=f"at most {tolerance:g} on padded batches, in fp32",
            mend="raise tolerance if the difference is acceptable",
        )
    text = f"{examples.answers_are} differ by at most {worst[0]:.1e} from torch in fp32"
    return text if made is plain else f"{text}, by {worst[1]:.1e} as they ship, where the largest is {largest:.1f}"
