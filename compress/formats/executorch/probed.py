"""Looking into an ExecuTorch program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.formats.executorch.file import read_pte
from compress.formats.executorch.model import PTE_FILE, ExecuTorchModel
from compress.formats.onnx.model import processor_of
from compress.formats.probed import Encode
from compress.formats.runtimes import why_unavailable
from compress.formats.targets import TARGETS


@dataclass(frozen=True)
class ProbedExecuTorch:
    """See `Probed`."""

    model: ExecuTorchModel

    def float_arrays(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every floating-point constant, scales among them."""
        for one in read_pte(self.model.program, Path(PTE_FILE)):
            if one.dtype in ("float16", "float32", "float64"):
                stored = np.frombuffer(self.model.program, np.uint8, one.bytes, one.start)
                yield one.name, stored.view(one.dtype)

    def digests(self) -> dict[str, str]:
        """Of every constant's type, shape and bytes."""
        return {
            one.name: hashlib.sha256(
                f"{one.dtype} {one.shape}".encode() + self.model.program[one.start : one.start + one.bytes]
            ).hexdigest()
            for one in read_pte(self.model.program, Path(PTE_FILE))
        }

    def unavailable_reason(self) -> str | None:
        """Why ExecuTorch is not to be had."""
        return why_unavailable(TARGETS["executorch"])

    def logits(self, encode: Encode) -> np.ndarray:
        """What ExecuTorch answers."""
        from compress.formats.executorch.runtime import open_bytes

        examples = encode(processor_of(self.model))
        batch = examples.batch(range(len(examples)))
        return examples.answers(open_bytes(self.model, threads=1).predict(batch), batch)


PROBED = ProbedExecuTorch
