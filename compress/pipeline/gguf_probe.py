"""What the integrity check reads of a GGUF model: its tensors one by one, and its predictions through llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.models.gguf_model import GgufModel
from compress.models.tokenizer import load_tokenizer
from compress.runtimes import get_runtime, why_unavailable
from compress.targets import TARGETS

if TYPE_CHECKING:
    from compress.tasks.task import Examples

_TARGET = TARGETS["llama-cpp"]


def why_no_predictions() -> str | None:
    """Why no GGUF model can answer here, or ``None``."""
    return why_unavailable(_TARGET)


def gguf_arrays(model: GgufModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as float32, with its name."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    for tensor in GGUFReader(model.file).tensors:
        yield str(tensor.name), dequantize(tensor.data, tensor.tensor_type)


def gguf_digests(model: GgufModel) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bytes, by name."""
    from gguf import GGUFReader

    digests = {}
    for tensor in GGUFReader(model.file).tensors:
        digest = hashlib.sha256(f"{tensor.tensor_type.name} {tensor.shape.tolist()}".encode())
        digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1).data)
        digests[str(tensor.name)] = digest.hexdigest()
    return digests


def gguf_logits(
    model: GgufModel, encode: Callable[[Any], Examples], windows: int, tokens: int, positions: int
) -> np.ndarray:
    """Logits [windows * positions, vocabulary] at the last ``positions`` of the beginnings of a few windows."""
    examples = encode(load_tokenizer(model.folder))
    ids = [example["input_ids"][:tokens] for example in examples.inputs[:windows]]
    length = min(len(one) for one in ids)
    session = get_runtime(_TARGET.runtime).open(model.file, _TARGET, threads=1)
    found = [session.predict({"input_ids": one[None, :length]})["logits"][0, -positions:] for one in ids]
    return np.concatenate(found)
