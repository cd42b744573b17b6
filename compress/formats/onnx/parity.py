"""Proof that an exported graph computes what the torch model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime

from compress.formats.prove import Answers, of_torch, prove
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel

_MEND = "set fusions: false, try another opset, or raise tolerance if the difference is acceptable"


def prove_equal(graph: onnx.ModelProto, model: TorchModel, examples: Examples, tolerance: float) -> float:
    """The largest difference of a logit, or of an embedding's entry, from torch. Raises `IntegrityError`."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    what = f"The exported graph's {examples.answers_are} differ from torch"
    reference, found = of_torch(model.module, examples), of_graph(session, examples)
    return prove(reference, found, examples, tolerance, what, mend=_MEND).worst


def of_graph(session: onnxruntime.InferenceSession, examples: Examples) -> Answers:
    """What a graph answers to examples."""
    names = [entry.name for entry in session.get_outputs()]
    inputs = [entry.name for entry in session.get_inputs()]

    def answered(indices: Sequence[int]) -> np.ndarray:
        batch = examples.batch(indices)
        found = session.run(names, {name: batch[name] for name in inputs})
        return examples.answers(dict(zip(names, found, strict=True)), batch)

    return answered
