"""A checkpoint's folder again with some of its tensors changed; everything else stays as it is, linked or copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints.checkpoint import TABLES, Checkpoint
from compress.checkpoints.checks import weight_files
from compress.errors import ModelError

if TYPE_CHECKING:
    import torch


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
