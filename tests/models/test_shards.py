"""Folders with some tensors changed: the rest keeps its bytes, and so does the folder that they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.models.checkpoint import TABLES, QuantizedCheckpoint
from compress.models.shards import write_shards, write_with_changes
from compress.utils.digests import digest_directory
from compress.utils.errors import ModelError

SCALES = "model.layers.0.mlp.up_proj.scales"


@pytest.fixture
def checkpoint(tmp_path: Path) -> QuantizedCheckpoint:
    return quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")


def test_only_what_is_named_changes(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    digest = digest_directory(checkpoint.folder)
    (tmp_path / "new").mkdir()
    doubled = checkpoint.stored(SCALES) * 2
    table = torch.full_like(checkpoint.quantized("model.embed_tokens").scales.T.half(), 0.5)
    write_with_changes(checkpoint, tmp_path / "new", {SCALES: doubled}, {"model.embed_tokens.scales": table})
    new = QuantizedCheckpoint(tmp_path / "new")
    assert digest_directory(checkpoint.folder) == digest, "the folder that it came from is linked to, not written to"
    assert torch.equal(new.stored(SCALES), doubled)
    assert torch.equal(new.quantized("model.embed_tokens").scales, table.T.float())
    assert new.tables == checkpoint.tables
    assert all(torch.equal(new.stored(name), checkpoint.stored(name)) for name in checkpoint.files if name != SCALES)
    same = {path.name for path in checkpoint.folder.iterdir()} - {"model.safetensors", TABLES}
    assert all((tmp_path / "new" / name).read_bytes() == (checkpoint.folder / name).read_bytes() for name in same)
    assert not list((tmp_path / "new").glob("*.partial"))


def test_shards_without_a_change_are_linked(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    tensors = [(name, source.stored(name)) for name in sorted(source.files)]
    (tmp_path / "sharded").mkdir()
    write_shards(tmp_path / "sharded", tensors, shard_bytes=100_000)
    (tmp_path / "sharded" / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    sharded = QuantizedCheckpoint(tmp_path / "sharded")
    (tmp_path / "new").mkdir()
    write_with_changes(sharded, tmp_path / "new", {"model.norm.weight": torch.full((64,), 3.0)})
    shard = sharded.files["model.norm.weight"].name
    links = {path.name: path.stat().st_nlink for path in (tmp_path / "new").glob("*.safetensors")}
    assert len(links) > 2 and links.pop(shard) == 1 and set(links.values()) == {2}
    assert torch.equal(QuantizedCheckpoint(tmp_path / "new").stored("model.norm.weight"), torch.full((64,), 3.0))


def test_a_change_of_nothing_is_refused(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ModelError, match=r"no tensor 'model\.scales' to change"):
        write_with_changes(checkpoint, tmp_path / "new", {"model.scales": torch.ones(1)})


@pytest.mark.parametrize("change", [lambda old: old.float(), lambda old: old[:1]])
def test_another_shape_or_dtype_is_refused(checkpoint: QuantizedCheckpoint, tmp_path: Path, change: object) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ModelError, match="would become"):
        write_with_changes(checkpoint, tmp_path / "new", {SCALES: change(checkpoint.stored(SCALES))})  # type: ignore[operator]
