"""Writing of a checkpoint's weights: shard by shard, or a copy with some tensors replaced."""

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
    """Write `model.safetensors`, or shards of about ``shard_bytes`` with an index; one shard is held in memory.

    Args:
        folder: Folder to write to.
        tensors: Names and tensors, in the order of the file.
        shard_bytes: Approximate size of a shard.
        index_one: Write an index for a single file too.
    """
    parts: list[Path] = []
    names: dict[str, int] = {}
    buffered: dict[str, torch.Tensor] = {}
    total, size = 0, 0
    for name, tensor in tensors:
        # Start a new shard before this tensor would exceed the limit.
        if buffered and size + tensor.nbytes > shard_bytes:
            parts.append(_write(folder, len(parts), buffered))
            buffered, size = {}, 0
        buffered[name], names[name] = tensor, len(parts)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    parts.append(_write(folder, len(parts), buffered))
    # The final names contain the number of shards, which is known only now.
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


def write_with_changes(
    checkpoint: Checkpoint,
    folder: Path,
    changed: Mapping[str, torch.Tensor],
    tables: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a copy of ``checkpoint`` in which some tensors are replaced; one shard is held in memory.

    Args:
        checkpoint: Source of all other files and tensors.
        folder: Existing, empty folder.
        changed: New tensors by name.
        tables: New tensors of the file `TABLES` by name.

    Raises:
        ModelError: If a tensor has another shape or dtype than the one it replaces, or replaces none.
    """
    # Link everything first, then replace only the files with changed tensors.
    checkpoint.save(folder)
    missing = set(changed) | set(tables or ())
    for file in weight_files(checkpoint.folder):
        missing -= _rewrite(file, folder / file.relative_to(checkpoint.folder), changed)
    if tables:
        missing -= _rewrite(checkpoint.folder / TABLES, folder / TABLES, tables)
    if missing:
        raise ModelError(f"The checkpoint has no tensor {min(missing)!r} to change.", where=str(checkpoint.folder))


def _rewrite(source: Path, target: Path, changed: Mapping[str, torch.Tensor]) -> set[str]:
    """Write a changed file to a temporary name and rename it, and return the names of the changed tensors.

    Renaming leaves other links to ``target`` unchanged.
    """
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
        # Shapes and types must stay, so that index and config remain valid.
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
    """Write a safetensors file that gets its name only after all of it is on disk."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    with partial.open("rb") as file:
        # Without this, a crash could leave a complete name with incomplete content.
        os.fsync(file.fileno())
    partial.replace(path)
