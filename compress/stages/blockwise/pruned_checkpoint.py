"""A checkpoint with parts cut out: its config then, and the tensors that go with it, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.models.checkpoint import Checkpoint
from compress.models.meta_model import build_decoder_on_meta, stored_shapes
from compress.models.shards import write_shards
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY
from compress.stages.blockwise.write import write_beside_weights
from compress.utils.errors import StageError

_NO_WORDS = {HEADS_KEY: "heads", NEURONS_KEY: "feed_forward"}

Cut = Callable[[Any], None]
"""Cuts a model without weights, in place, and its config with it."""


def config_changes(folder: Path, cut: Cut) -> dict[str, Any]:
    """Return the fields of config.json that ``cut`` changes.

    Raises `StageError` as it does, and where the architecture's own config cannot say what is left, since the readers
    of a language model go by nothing else.
    """
    module = build_decoder_on_meta(folder)
    before = module.config.to_dict()
    cut(module)
    changed = {name: value for name, value in module.config.to_dict().items() if before.get(name) != value}
    field = next((field for key, field in _NO_WORDS.items() if changed.get(key)), None)
    if field is not None:
        raise StageError(
            f"The config of a {module.config.model_type!r} model cannot say that {field} were cut.",
            where=f"prune.{field}",
            expected="an architecture whose config has a size of heads, or a width of feed-forward layers, of its own, "
            "and blocks that are all alike",
            hint=f"leave {field} out, or cut layers instead",
        )
    return changed


def write_pruned(
    source: Checkpoint, folder: Path, changes: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Checkpoint:
    """``tensors`` and what lies beside those of ``source``, with ``changes`` of its config, in a new ``folder``.

    One shard is in memory at a time. Raises `StageError` for tensors that aren't those that the config asks for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_beside_weights(source, folder, **changes)
    wanted = {name: list(shape) for name, shape in stored_shapes(build_decoder_on_meta(folder)).items()}
    write_shards(folder, _as_wanted(tensors, wanted))
    if wanted:
        raise StageError(f"The cut model lacks {min(wanted)!r}, and {len(wanted) - 1} tensors more.", where=str(folder))
    return Checkpoint(folder)


def _as_wanted(
    tensors: Iterable[tuple[str, torch.Tensor]], wanted: dict[str, list[int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once it has the shape that is ``wanted`` of it; what has come is taken from there.

    What no module asks for, such as a head that is tied to its embedding, stays beside the others.
    """
    for name, tensor in tensors:
        shape = wanted.pop(name, None)
        if shape is not None and shape != list(tensor.shape):
            raise StageError(
                f"The tensor {name!r} is {list(tensor.shape)} once it is cut; the config makes it {shape}.",
                hint="leave the stage out, and report the architecture",
            )
        yield name, tensor


def cached_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file has its name only once it is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
