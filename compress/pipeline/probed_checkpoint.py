"""Looking into a checkpoint that need not fit in memory."""

from __future__ import annotations

import numpy as np

from compress.checkpoints.checkpoint import TABLES, Checkpoint
from compress.checkpoints.checks import weight_files
from compress.checkpoints.safetensors_file import read_header
from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode, Probing, Stored


def stored(model: Checkpoint) -> Stored:
    """Every tensor, mapped from its file."""
    tables = model.folder / TABLES
    for file in (*weight_files(model.folder), *([tables] if tables.is_file() else [])):
        for tensor in read_header(file):
            yield tensor, tensor.data()


def logits(model: Checkpoint, encode: Encode) -> np.ndarray:
    """Logits [positions, vocabulary] with one block in memory at a time."""
    import torch

    from compress.checkpoints.tokenizer import load_tokenizer
    from compress.quantization.build import build_skeleton
    from compress.quantization.logits import last_hidden

    skeleton = build_skeleton(model)
    windows = [example["input_ids"] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    length = min(TOKENS, *(len(window) for window in windows))
    ids = torch.from_numpy(np.stack([window[:length] for window in windows]))
    with torch.no_grad():
        found = skeleton.logits(last_hidden(skeleton, ids)[:, -POSITIONS:])
    return np.asarray(found.flatten(0, 1))


PROBED = Probing(stored, logits)
