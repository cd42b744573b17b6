"""Looking into a Core ML package."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.coreml.file import read_coreml
from compress.formats.coreml.model import PACKAGE, CoreMlModel
from compress.formats.onnx.model import processor_of
from compress.formats.probed import Encode
from compress.formats.runtimes import get_runtime, why_unavailable
from compress.formats.targets import TARGETS


@dataclass(frozen=True)
class ProbedCoreMl:
    """See `Probed`."""

    model: CoreMlModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point constant, scales among them."""
        for one in read_coreml(self.model.specification, self.model.weights, Path(PACKAGE)).constants:
            if one.floats:
                yield one.name, one.values(self.model.weights)

    def digests(self) -> dict[str, str]:
        """Of every constant's type, shape and bytes."""
        weights = self.model.weights
        return {
            one.name: hashlib.sha256(
                f"{one.dtype} {one.shape}".encode() + weights[one.start : one.start + one.bytes]
            ).hexdigest()
            for one in read_coreml(self.model.specification, weights, Path(PACKAGE)).constants
        }

    def unavailable_reason(self) -> str | None:
        """Why Core ML is not to be had."""
        return why_unavailable(TARGETS["coreml"])

    def logits(self, encode: Encode) -> np.ndarray:
        """What Core ML answers."""
        examples = encode(processor_of(self.model))
        batch = examples.batch(range(len(examples)))
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_package(Path(folder) / PACKAGE)
            session = get_runtime("coreml").open(Path(folder), TARGETS["coreml"], threads=1)
            return examples.answers(session.predict(batch), batch)


PROBED = ProbedCoreMl
