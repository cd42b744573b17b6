"""Looking into a checkpoint that need not fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compress.checkpoints.checkpoint import TABLES, Checkpoint
from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode


@dataclass(frozen=True)
class ProbedCheckpoint:
    """See `Probed`."""

    model: Checkpoint

    def float_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every floating-point weight in pieces, mapped from its file."""
        from compress.checkpoints.checks import CHUNK_ELEMENTS

        for name, array in self._stored():
            if "float" in array.dtype.name:
                values = array.reshape(-1)
                for start in range(0, values.size, CHUNK_ELEMENTS):
                    yield name, values[start : start + CHUNK_ELEMENTS]

    def digests(self) -> dict[str, str]:
        """Of every stored tensor, its type counted in."""
        digests = {}
        for name, array in self._stored():
            digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
            digests[name] = digest.hexdigest()
        return digests

    def unavailable_reason(self) -> None:
        """It answers everywhere."""

    def logits(self, encode: Encode) -> np.ndarray:
        """Logits [positions, vocabulary] with one block in memory at a time."""
        import torch

        from compress.checkpoints.tokenizer import load_tokenizer
        from compress.quantization.build import build_skeleton
        from compress.quantization.logits import last_hidden

        skeleton = build_skeleton(self.model)
        windows = [example["input_ids"] for example in encode(load_tokenizer(self.model.folder)).inputs[:WINDOWS]]
        length = min(TOKENS, *(len(window) for window in windows))
        ids = torch.from_numpy(np.stack([window[:length] for window in windows]))
        with torch.no_grad():
            logits = skeleton.logits(last_hidden(skeleton, ids)[:, -POSITIONS:])
        return np.asarray(logits.flatten(0, 1))

    def _stored(self) -> Iterator[tuple[str, np.ndarray]]:
        from compress.checkpoints.checks import weight_files
        from compress.checkpoints.safetensors_file import load_array, read_header

        tables = self.model.folder / TABLES
        for file in (*weight_files(self.model.folder), *([tables] if tables.is_file() else [])):
            for tensor in read_header(file):
                yield tensor.name, load_array(tensor)
