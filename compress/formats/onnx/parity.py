"""Proof that an exported graph computes what the torch model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import torch

from compress.errors import IntegrityError
from compress.tasks.forward import answers, tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel

_BATCH = 8
_SPREAD = 32


def prove_equal(graph: onnx.ModelProto, model: TorchModel, examples: Examples, tolerance: float) -> float:
    """The largest difference of a logit, or of an embedding's entry, from torch, over padded and single batches.

    Batches mix lengths from the shortest to the longest example, so padding is put to the test; the first example
    also runs alone. Raises `IntegrityError` above ``tolerance``.
    """
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    worst = 0.0
    for indices in mixed_batches(examples):
        batch = examples.batch(indices)
        outputs = graph_answers(session, examples, batch)
        inputs = {name: value for name, value in tensors(examples, indices).items() if name in examples.padding}
        with torch.inference_mode():
            expected = answers(examples, model.module.eval()(**inputs), inputs).numpy()
        # Unlike max, numpy's maximum does not lose a NaN.
        worst = float(np.maximum(worst, np.abs(outputs - expected).max()))
    if not worst <= tolerance:
        raise IntegrityError(
            f"The exported graph's {examples.answers_are} differ from torch by {worst:.2e}.",
            expected=f"at most {tolerance:g} on padded batches",
            mend="set fusions: false, try another opset, or raise tolerance if the difference is acceptable",
        )
    return worst


def graph_answers(
    session: onnxruntime.InferenceSession, examples: Examples, batch: Mapping[str, np.ndarray]
) -> np.ndarray:
    """What a graph answers to a batch of ``examples``."""
    names = [entry.name for entry in session.get_outputs()]
    found = session.run(names, {entry.name: batch[entry.name] for entry in session.get_inputs()})
    return examples.answers(dict(zip(names, found, strict=True)), batch)


def mixed_batches(examples: Examples) -> list[list[int]]:
    """Up to four batches whose members lie far apart in length, and one single example."""
    order = np.argsort(examples.lengths(), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(_SPREAD, len(order))).round().astype(int)]
    groups = [spread[start :: max(1, len(spread) // _BATCH)] for start in range(max(1, len(spread) // _BATCH))]
    return [[int(i) for i in group] for group in groups] + [[int(order[0])]]
