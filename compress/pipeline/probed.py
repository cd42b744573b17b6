"""Looking into a model of any kind: weights as transformers has them, or a format's."""

from __future__ import annotations

import numpy as np

from compress.checkpoints.checkpoint import TABLES, Checkpoint
from compress.checkpoints.checks import weight_files
from compress.checkpoints.model import Model
from compress.checkpoints.safetensors_file import read_header
from compress.checkpoints.torch_model import TorchModel
from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode, Probed, Probing, Stored, of_arrays, of_files
from compress.formats.registry import part_of


def probed(model: Model) -> Probed:
    """The way of looking into a model of its kind."""
    if isinstance(model, TorchModel):
        return _MODULE(model)
    if isinstance(model, Checkpoint):
        return _CHECKPOINT(model)
    found: Probing = part_of(model.kind, "probed") or of_files(model.kind)
    return found(model)


def _answers(model: TorchModel, encode: Encode) -> np.ndarray:
    """What the module itself answers."""
    from compress.tasks.forward import predict

    return predict(model.module, encode(model.processor))


def _stored(model: Checkpoint) -> Stored:
    """Every tensor, mapped from its file: a checkpoint need not fit in memory."""
    tables = model.folder / TABLES
    for file in (*weight_files(model.folder), *([tables] if tables.is_file() else [])):
        for tensor in read_header(file):
            yield tensor, tensor.data()


def _logits(model: Checkpoint, encode: Encode) -> np.ndarray:
    """Logits [positions, vocabulary] with one block in memory at a time."""
    import torch

    from compress.checkpoints.processor import load_tokenizer
    from compress.quantization.build import build_skeleton, last_hidden

    skeleton = build_skeleton(model)
    windows = [example["input_ids"] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    length = min(TOKENS, *(len(window) for window in windows))
    ids = torch.from_numpy(np.stack([window[:length] for window in windows]))
    with torch.no_grad():
        found = skeleton.logits(last_hidden(skeleton, ids)[:, -POSITIONS:])
    return np.asarray(found.flatten(0, 1))


_MODULE = Probing(lambda model: of_arrays((name, one.numpy()) for name, one in model.tensors().items()), _answers)
_CHECKPOINT = Probing(_stored, _logits)
