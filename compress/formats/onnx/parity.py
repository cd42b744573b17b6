"""Proof that an exported graph computes what the torch model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.prove import of_session, of_torch, prove
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel

_MEND = "set fusions: false, try another opset, or raise tolerance if the difference is acceptable"


def prove_equal(graph: onnx.ModelProto, model: TorchModel, examples: Examples, tolerance: float) -> float:
    """The largest difference of a logit, or of an embedding's entry, from torch. Raises `IntegrityError`."""
    what = f"The exported graph's {examples.answers_are} differ from torch"
    reference, found = of_torch(model.module, examples), of_session(session_of(graph), examples)
    return prove(reference, found, examples, tolerance, what, hint=_MEND).worst
