"""Writing a checkpoint's weights: as they come, shard by shard, or a folder again with some tensors changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.folder_checks import INDEX, WEIGHTS, weight_files
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 500_000_000


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES, index_one: bool = False
) -> None:
    """Write `model.safetensors`, or shards of about ``shard_bytes`` with their index; holds one shard in memory.

    With ``index_one`` even a single file has an index.
    """
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
    shards = [f"model-{index + 1:05}-of-{len(parts):05}.safetensors" for index in range(len(parts))]
    if len(parts) == 1:
        shards = [WEIGHTS]
    for part, shard in zip(parts, shards, strict=True):
        part.rename(folder / shard)
    if len(parts) == 1 and not index_one:
        return
    index = {"metadata": {"total_size": total}, "weight_map": {name: shards[names[name]] for name in sorted(names)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    path = folder / f"part-{index:05}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def write_changed(
    checkpoint: Checkpoint,
    folder: Path,
    changed: Mapping[str, torch.Tensor],
    tables: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write ``checkpoint`` into the existing, empty ``folder`` with tensors in place of those of the same name.

    ``tables`` are tensors of `TABLES`. Holds one shard in memory. Raises `ModelError` for a tensor of another shape or
    dtype than the one that it replaces, or that replaces none.
    """
    checkpoint.save(folder)
    left = set(changed) | set(tables or ())
    for file in weight_files(checkpoint.folder):
        left -= _rewrite(file, folder / file.relative_to(checkpoint.folder), changed)
    if tables:
        left -= _rewrite(checkpoint.folder / TABLES, folder / TABLES, tables)
    if left:
        raise ModelError(f"The checkpoint has no tensor {min(left)!r} to change.", where=str(checkpoint.folder))


def _rewrite(source: Path, target: Path, changed: Mapping[str, torch.Tensor]) -> set[str]:
    """Write a file beside and rename it, so that what ``target`` is linked to stays as it is; returns what changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as file:
        names = set(file.keys()) & set(changed)
        if not names:
            return names
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name in names:
        old, new = tensors[name], changed[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ModelError(
                f"The tensor {name!r} would become {list(new.shape)} {new.dtype}.",
                where=str(source),
                expected=f"{list(old.shape)} {old.dtype}",
            )
        tensors[name] = new.contiguous()
    partial = target.with_name(f"{target.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(target)
    return names


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that has its name only once it is whole and on the disk."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
