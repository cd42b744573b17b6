"""Looking into a LiteRT file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.litert.model import LITERT_FILE, LiteRtModel
from compress.formats.onnx.model import processor_of
from compress.formats.probed import Encode
from compress.formats.runtimes import why_unavailable
from compress.formats.targets import TARGETS


@dataclass(frozen=True)
class ProbedLiteRt:
    """See `Probed`."""

    model: LiteRtModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every stored floating-point tensor, scales among them; a single number, as a mask has, is no weight."""
        from compress.formats.litert.file import read_litert

        for tensor in read_litert(self.model.graph, Path(LITERT_FILE)).tensors:
            if tensor.floats and tensor.shape:
                yield tensor.name, tensor.values(self.model.graph)

    def digests(self) -> dict[str, str]:
        """Of every stored tensor's type, shape and bytes."""
        from compress.formats.litert.file import read_litert

        return {
            one.name: hashlib.sha256(
                f"{one.dtype} {one.shape}".encode() + self.model.graph[one.start : one.start + one.bytes]
            ).hexdigest()
            for one in read_litert(self.model.graph, Path(LITERT_FILE)).tensors
        }

    def unavailable_reason(self) -> str | None:
        """Why LiteRT is not to be had."""
        return why_unavailable(TARGETS["litert"])

    def logits(self, encode: Encode) -> np.ndarray:
        """What LiteRT answers."""
        from compress.formats.litert.runtime import open_bytes

        examples = encode(processor_of(self.model))
        batch = examples.batch(range(len(examples)))
        return examples.answers(open_bytes(self.model, threads=1).predict(batch), batch)


PROBED = ProbedLiteRt
