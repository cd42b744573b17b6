"""Looking into OpenVINO's IR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.onnx.model import processor_of
from compress.formats.openvino.model import IR_FILE, OpenVinoModel
from compress.formats.probed import Encode
from compress.formats.runtimes import why_unavailable
from compress.formats.targets import TARGETS


@dataclass(frozen=True)
class ProbedOpenVino:
    """See `Probed`."""

    model: OpenVinoModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point constant."""
        from compress.formats.openvino.ir import read_ir

        for constant in read_ir(self.model.graph, Path(IR_FILE), len(self.model.weights)):
            if constant.floats:
                yield constant.name, constant.values(self.model.weights)

    def digests(self) -> dict[str, str]:
        """Of every constant's type, shape and bytes."""
        return dict(self._digests())

    def _digests(self) -> Iterator[tuple[str, str]]:
        import hashlib

        from compress.formats.openvino.ir import read_ir

        for one in read_ir(self.model.graph, Path(IR_FILE), len(self.model.weights)):
            digest = hashlib.sha256(f"{one.dtype} {one.shape}".encode())
            digest.update(self.model.weights[one.start : one.start + one.bytes])
            yield one.name, digest.hexdigest()

    def unavailable_reason(self) -> str | None:
        """Why OpenVINO is not to be had."""
        return why_unavailable(TARGETS["openvino"])

    def logits(self, encode: Encode) -> np.ndarray:
        """What OpenVINO answers."""
        from compress.formats.openvino.runtime import open_bytes

        examples = encode(processor_of(self.model))
        batch = examples.batch(range(len(examples)))
        return examples.answers(open_bytes(self.model, threads=1).predict(batch), batch)


PROBED = ProbedOpenVino
