"""The checkpoint that ships: packed layers in the AutoGPTQ layout, everything else as float16, shard by shard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.models.checkpoint import TABLES, Checkpoint, QuantizedCheckpoint, write_shards
from compress.models.folder_checks import INDEX
from compress.models.gptq_layout import PARTS
from compress.models.meta_model import build_decoder_on_meta, stored_shapes
from compress.models.model import link_or_copy
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY
from compress.stages.blockwise.layers import Layer
from compress.stages.blockwise.resume import BlockCache, EmbeddingTables
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError
from compress.utils.storage import storage_errors

LAYERS = "quantized_layers.json"
"""What became of every layer, beside the checkpoint."""
_ROWS = 8192
"""Rows that are stored as float16 at a time."""
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Result:
    """Everything that the walk left; ``plan`` has the layers of each block, ``tables`` the embedding and the head."""

    source: Checkpoint
    config: Quantization
    plan: Sequence[Sequence[Layer]]
    tables: Sequence[Layer]
    average_bits: float
    finished: BlockCache
    work: EmbeddingTables
    skipped: frozenset[str] = frozenset()
    """Tensors of the source that say again what another says: a tied head."""
    made_by: Mapping[str, Any] | None = None
    """What made it, in place of our own solver."""

    def write(self, folder: Path) -> QuantizedCheckpoint:
        """Write the checkpoint into a new ``folder``. Raises `StageError` for a value beyond float16."""
        write_companions(self.source, folder, dtype="float16", quantization_config=self.quantization())
        has_tables = any(table.bits for table in self.tables)
        # With an index, since gptqmodel would take `TABLES` for the weights.
        write_shards(folder, self._tensors(), index_one=has_tables)
        if has_tables:
            link_or_copy(self.work.packed, folder / TABLES)
        _write_json(folder / "quantize_config.json", self.quantization())
        about = {"bits_per_parameter": self.average_bits, "layers": [layer.to_json() for layer in self.layers]}
        _write_json(folder / LAYERS, about)
        return QuantizedCheckpoint(folder)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer and table, in the order of the model."""
        return (*self.tables, *(layer for block in self.plan for layer in block))

    def quantization(self) -> dict[str, Any]:
        """`quantization_config` as transformers and gptqmodel read it."""
        fields: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.config.bits,
            "group_size": self.config.group_size,
            "sym": self.config.sym,
            "desc_act": False,
            "true_sequential": True,
            "damp_percent": self.config.damp_percent,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.config.sym else "gptq_v2",
            "pack_dtype": "int32",
            "meta": self.made_by or {"quantizer": [f"compress:{__version__}"], "act_order": self.config.act_order},
        }
        # Gptqmodel's rules for layers that differ from the rest: a pattern that matches the name -> what differs.
        layers = [(f":^{re.escape(layer.name)}$", layer) for block in self.plan for layer in block]
        changes = {f"+{name}": changed for name, layer in layers if layer.bits and (changed := self._differing(layer))}
        changes |= {f"-{name}": {} for name, layer in layers if layer.bits is None and layer.why.startswith("kept")}
        if changes:
            fields["dynamic"] = changes
        # The quantized layers' names within a block if some stay float, since optimum knows no patterns.
        names: dict[str, bool] = {}
        for index, block in enumerate(self.plan):
            for layer in block:
                short = layer.name.split(f".{index}.", 1)[1]
                names[short] = names.get(short, False) or layer.bits is not None
        if not all(names.values()):
            fields["modules_in_block_to_quantize"] = [[name for name, quantized in names.items() if quantized]]
        return fields

    def _differing(self, layer: Layer) -> dict[str, int]:
        """`bits` and `group_size` of a layer where they are not those of the whole."""
        assert layer.bits is not None and layer.group_size is not None
        size = -1 if layer.group_size == layer.columns else layer.group_size
        same_size = size == self.config.group_size or layer.group_size == self.config.group_size
        differences = {} if layer.bits == self.config.bits else {"bits": layer.bits}
        return differences if same_size else differences | {"group_size": size}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        places = {layer.name: index for index, block in enumerate(self.plan) for layer in block if layer.bits}
        changed = {name: index for index in range(len(self.plan)) for name in self.finished.names(index)}
        tables = {table.name for table in self.tables if table.bits}
        for name in self.source.files:
            module = name.removesuffix(".weight")
            if module in places:
                for part in PARTS:
                    yield f"{module}.{part}", self.finished.tensor(places[module], f"{module}.{part}")
            elif module in tables:
                yield name, self.work.floats(module)
            elif name in changed:
                yield name, _half(name, self.finished.tensor(changed[name], name))
            elif name not in self.skipped:
                yield name, _half(name, self.source.stored(name))


def write_floats(source: Checkpoint, folder: Path, changed: Iterable[tuple[str, torch.Tensor]]) -> Checkpoint:
    """Write ``source`` to a new ``folder`` with some tensors ``changed``, which are stored first.

    Raises `StorageError`.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        done = set()
        for name, tensor in changed:
            done.add(name)
            yield name, tensor
        yield from ((name, source.stored(name)) for name in source.files if name not in done)

    with storage_errors(folder.parent):
        write_companions(source, folder, dtype="float32")
        write_shards(folder, tensors())
    return Checkpoint(folder)


def write_companions(source: Checkpoint, folder: Path, **changes: object) -> None:
    """Write the config with ``changes`` into a new ``folder``, and copy the tokenizer's files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in _COMPANIONS:
        for path in sorted(source.folder.glob(pattern)):
            if path.name not in ("config.json", INDEX):
                shutil.copyfile(path, folder / path.name)
    config = {name: value for name, value in source.config.items() if name != "torch_dtype"}
    _write_json(folder / "config.json", config | changes)


def _half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = torch.empty(tensor.shape, dtype=torch.float16)
    # By rows: a mask of a whole embedding table, and what goes before it, would be the most memory of all the work.
    pairs = zip(torch.split(tensor, _ROWS), torch.split(half, _ROWS), strict=True) if tensor.ndim else [(tensor, half)]
    for rows, halves in pairs:
        if not bool(torch.isfinite(halves.copy_(rows)).all()):
            raise StageError(
                f"The tensor {name!r} holds values beyond float16, in which it would be stored.",
                expected="values below 65,504",
            )
    return half


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_NO_WORDS = {HEADS_KEY: "heads", NEURONS_KEY: "feed_forward"}

Cut = Callable[[Any], None]
"""Cuts a model without weights, in place, and its config with it."""


def config_changes(folder: Path, cut: Cut) -> dict[str, Any]:
    """Return the fields of config.json that ``cut`` changes.

    Raises `StageError` as it does, and where the architecture's own config cannot say what is left, since the readers
    of a language model go by nothing else.
    """
    module = build_decoder_on_meta(folder)
    original = module.config.to_dict()
    cut(module)
    changed = {name: value for name, value in module.config.to_dict().items() if original.get(name) != value}
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
    source: Checkpoint, folder: Path, changes: Mapping[str, object], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Checkpoint:
    """``tensors`` and what lies beside those of ``source``, with ``changes`` of its config, in a new ``folder``.

    One shard is in memory at a time. Raises `StageError` for tensors that aren't those that the config asks for.
    """
    write_companions(source, folder, **changes)
    expected_shapes = {name: list(shape) for name, shape in stored_shapes(build_decoder_on_meta(folder)).items()}
    write_shards(folder, _as_wanted(tensors, expected_shapes))
    if expected_shapes:
        raise StageError(
            f"The cut model lacks {min(expected_shapes)!r}, and {len(expected_shapes) - 1} tensors more.",
            where=str(folder),
        )
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


def cached_json(path: Path, value: object) -> None:
    """Write ``value`` so that the file has its name only once it is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
