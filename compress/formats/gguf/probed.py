"""Looking into a GGUF model: its tensors one by one, and its predictions through llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compress.checkpoints.tokenizer import load_tokenizer
from compress.formats.gguf.model import GgufModel
from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode
from compress.formats.runtimes import get_runtime, why_unavailable
from compress.formats.targets import TARGETS

_TARGET = TARGETS["llama-cpp"]


@dataclass(frozen=True)
class ProbedGguf:
    """See `Probed`."""

    model: GgufModel

    def float_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor as float32."""
        from gguf import GGUFReader
        from gguf.quants import dequantize

        for tensor in GGUFReader(self.model.file).tensors:
            yield str(tensor.name), dequantize(tensor.data, tensor.tensor_type)

    def digests(self) -> dict[str, str]:
        """Of every tensor, its type counted in."""
        from gguf import GGUFReader

        digests = {}
        for tensor in GGUFReader(self.model.file).tensors:
            digest = hashlib.sha256(f"{tensor.tensor_type.name} {tensor.shape.tolist()}".encode())
            digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1).data)
            digests[str(tensor.name)] = digest.hexdigest()
        return digests

    def unavailable_reason(self) -> str | None:
        """Why llama.cpp is not to be had."""
        return why_unavailable(_TARGET)

    def logits(self, encode: Encode) -> np.ndarray:
        """Logits [windows * positions, vocabulary] at the last positions of the beginnings of a few windows."""
        examples = encode(load_tokenizer(self.model.folder))
        ids = [example["input_ids"][:TOKENS] for example in examples.inputs[:WINDOWS]]
        length = min(len(one) for one in ids)
        session = get_runtime(_TARGET.runtime).open(self.model.file, _TARGET, threads=1)
        found = [session.predict({"input_ids": one[None, :length]})["logits"][0, -POSITIONS:] for one in ids]
        return np.concatenate(found)


PROBED = ProbedGguf
