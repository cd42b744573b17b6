"""Looking into a GGUF model: its tensors one by one, and its predictions through llama.cpp."""

from __future__ import annotations

import numpy as np

from compress.formats.gguf.model import GgufModel
from compress.formats.gguf.read import read_gguf
from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode, Probing, Stored
from compress.formats.runtimes import get_runtime
from compress.formats.targets import TARGETS
from compress.models.processor import load_tokenizer

_TARGET = TARGETS["llama-cpp"]


def stored(model: GgufModel) -> Stored:
    """Every tensor, mapped from its file."""
    return ((one, one.data()) for one in read_gguf(model.file).tensors)


def logits(model: GgufModel, encode: Encode) -> np.ndarray:
    """Logits [windows * positions, vocabulary] at the last positions of the beginnings of a few windows."""
    examples = encode(load_tokenizer(model.folder))
    ids = [example["input_ids"][:TOKENS] for example in examples.inputs[:WINDOWS]]
    length = min(len(one) for one in ids)
    session = get_runtime(_TARGET.runtime).open(model.file, _TARGET, threads=1)
    found = [session.predict({"input_ids": one[None, :length]})["logits"][0, -POSITIONS:] for one in ids]
    return np.concatenate(found)


PROBED = Probing(stored, logits, "llama-cpp")
