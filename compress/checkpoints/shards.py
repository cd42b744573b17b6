"""Writing a checkpoint's weights as they come, shard by shard, in the names that transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints.checks import INDEX, WEIGHTS

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of about ``shard_bytes`` with their index; holds one shard in memory."""
    parts: list[Path] = []
    names: dict[str, int] = {}
    held: dict[str, torch.Tensor] = {}
    total, size = 0, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            parts.append(_write(folder, len(parts), held))
            held, size = {}, 0
        held[name], names[name] = tensor, len(parts)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    parts.append(_write(folder, len(parts), held))
    if len(parts) == 1:
        parts[0].rename(folder / WEIGHTS)
        return
    shards = [f"model-{index + 1:05}-of-{len(parts):05}.safetensors" for index in range(len(parts))]
    for part, shard in zip(parts, shards, strict=True):
        part.rename(folder / shard)
    index = {"metadata": {"total_size": total}, "weight_map": {name: shards[names[name]] for name in sorted(names)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    path = folder / f"part-{index:05}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path
