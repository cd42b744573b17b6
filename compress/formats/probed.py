"""What the integrity check asks of a model, whatever its kind; one module for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.torch_model import TorchModel
from compress.formats.coreml.model import CoreMlModel
from compress.formats.executorch.model import ExecuTorchModel
from compress.formats.gguf.model import GgufModel
from compress.formats.litert.model import LiteRtModel
from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.model import OpenVinoModel
from compress.formats.ort.model import OrtModel

if TYPE_CHECKING:
    from compress.tasks.task import Examples

_Formats = OnnxModel | GgufModel | OrtModel | OpenVinoModel | ExecuTorchModel | LiteRtModel | CoreMlModel
AnyModel = TorchModel | Checkpoint | _Formats
Encode = Callable[[Any], "Examples"]
"""From a processor to the probes as it encodes them."""

WINDOWS = 4
TOKENS = 64
POSITIONS = 8
"""Running text is probed at the last positions of the beginnings of a few windows."""
_KINDS: dict[type[Any], str] = {
    TorchModel: "compress.pipeline.probed_module",
    Checkpoint: "compress.pipeline.probed_checkpoint",
    OnnxModel: "compress.formats.onnx.probed",
    OrtModel: "compress.formats.ort.probed",
    OpenVinoModel: "compress.formats.openvino.probed",
    ExecuTorchModel: "compress.formats.executorch.probed",
    LiteRtModel: "compress.formats.litert.probed",
    CoreMlModel: "compress.formats.coreml.probed",
    GgufModel: "compress.formats.gguf.probed",
}


class Probed(Protocol):
    """A model that can be looked into."""

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point weight with its name; a large one may come in pieces."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of each weight's shape and bytes, by name."""

    def unavailable_reason(self) -> str | None:
        """Why it cannot answer here, or ``None``: its runtime may be an optional package."""

    def logits(self, encode: Encode) -> np.ndarray:
        """What it answers to the probes, [n, ...]."""


def probed(model: AnyModel) -> Probed:
    """The way of looking into a model of its kind."""
    kind = next(kind for cls, kind in _KINDS.items() if isinstance(model, cls))
    found: Probed = import_module(kind).PROBED(model)
    return found


def digest_array(array: np.ndarray) -> str:
    """SHA-256 of an array's shape and bytes, as hex."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
