"""Tests of safetensors files, shards, single tensors and the GPTQ layout."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from quantized import quantize_tiny_llama, rounded, save_tiny_llama
from safetensors.numpy import save_file

from compress.models.checkpoint import TABLES, QuantizedCheckpoint, write_shards, write_with_changes
from compress.models.gptq_layout import pack_bits, pack_layer, unpack_bits, unpack_layer
from compress.models.safetensors_file import read_header
from compress.models.stored_tensor import infer_role, numpy_dtype, stored
from compress.utils.errors import ModelError
from compress.utils.storage import digest_directory


def write(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_of_hand_made_bytes_gives_offsets_and_values(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("BF16", [2], 8, 12), "a": entry("F32", [1, 2], 0, 8)}
    bfloat = struct.pack("<HH", 0x3F80, 0xC000)  # 1.0 and -2.0 are the upper halves of their fp32 patterns
    path = write(tmp_path / "x.safetensors", header, struct.pack("<ff", 0.5, 3.0) + bfloat)

    first, second = read_header(path)

    text_bytes = len(json.dumps(header))
    assert (first.name, first.dtype, first.shape, first.start, first.bytes) == (
        "a",
        "float32",
        (1, 2),
        8 + text_bytes,
        8,
    )
    assert (second.name, second.dtype, second.elements, second.start, second.bytes) == (
        "b",
        "bfloat16",
        2,
        16 + text_bytes,
        4,
    )
    assert first.values().tolist() == [[0.5, 3.0]]
    assert second.values().astype(float).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int64, np.bool_, ml_dtypes.float8_e5m2])
def test_values_agree_with_the_reference_writer(tmp_path: Path, dtype: type) -> None:
    values = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    save_file({"w": values}, tmp_path / "x.safetensors")
    (tensor,) = read_header(tmp_path / "x.safetensors")
    read = tensor.values()
    assert read.dtype == values.dtype
    assert read.tobytes() == values.tobytes()


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.safetensors", {"a": entry("F32", [2], 0, 8)}, bytes(8)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"of {length} bytes is truncated or broken"):
            read_header(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ([1], b"", "invalid type: sequence"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), "invalid shape, data type, or offset"),
        ({"a": entry("X9", [2], 0, 8)}, bytes(8), "unknown variant `X9`"),
        ({"a": entry("F32", [1], 0, 4)}, bytes(6), "not fully covered"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, header: object, data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_header(write(tmp_path / "x.safetensors", header, data))


SCALES = "model.layers.0.mlp.up_proj.scales"


@pytest.fixture
def checkpoint(tmp_path: Path) -> QuantizedCheckpoint:
    return quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")


def test_only_named_tensors_change(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
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


def test_unchanged_shards_are_hard_links(tmp_path: Path) -> None:
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


def test_change_of_an_unknown_tensor_is_refused(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ModelError, match=r"no tensor 'model\.scales' to change"):
        write_with_changes(checkpoint, tmp_path / "new", {"model.scales": torch.ones(1)})


@pytest.mark.parametrize("change", [lambda old: old.float(), lambda old: old[:1]])
def test_changed_shape_or_dtype_is_refused(checkpoint: QuantizedCheckpoint, tmp_path: Path, change: object) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ModelError, match="would become"):
        write_with_changes(checkpoint, tmp_path / "new", {SCALES: change(checkpoint.stored(SCALES))})  # type: ignore[operator]


def test_values_are_read_from_file_and_from_bytes(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = b"head" + values.tobytes() + b"tail"
    (tmp_path / "file").write_bytes(content)
    tensor = stored("a.weight", "float16", (2, 3), tmp_path / "file", (4, values.nbytes))
    for actual in (tensor.values(), tensor.values(content)):
        assert actual.dtype == np.float16 and not actual.flags.writeable
        np.testing.assert_array_equal(actual, values)
    assert tensor.data().tobytes() == values.tobytes() and tensor.module == "a"
    assert (tensor.parameters, tensor.elements, tensor.bytes, tensor.origin) == (6, 6, 12, "a.weight")


def test_empty_tensor_is_read_without_file_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert stored("e", "float32", (0, 4), tmp_path / "file", (0, 0)).values().shape == (0, 4)


def test_only_weight_tensors_count_as_parameters() -> None:
    tensor = stored("a.scale", "float32", (2, 3), Path(), (0, 24), infer_role("float32", (2, 3), scales=True))
    assert (tensor.role, tensor.parameters) == ("quantization", 0)
    assert infer_role("float32", ()) == infer_role("int64", (3,)) == "constant"
    assert infer_role("int8", (3,)) == infer_role("bfloat16", (3,)) == "weight"


def test_unreadable_dtypes_are_refused() -> None:
    assert numpy_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
    for name in ("float4_e2m1fn", "int4", "nf4", "string"):
        tensor = stored("a", name, (2,), Path(), (0, 2))
        assert not tensor.readable
        with pytest.raises(ModelError, match=f"'a' has the type {name}, which cannot be read"):
            tensor.values(b"12")
    halves = stored("a", "int4", (4,), Path(), (0, 2), packed=True, decode=lambda data: data.repeat(2))
    assert not halves.readable and halves.values(b"12").shape == (4,)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq_column_is_one_bit_stream(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 1 << bits, (64, 5), generator=generator)
    words = pack_bits(values, bits)
    for column in range(5):
        stream = sum(int(value) << (bits * position) for position, value in enumerate(values[:, column]))
        expected = [stream >> (32 * position) & 0xFFFFFFFF for position in range(2 * bits)]
        assert [int(word) & 0xFFFFFFFF for word in words[:, column]] == expected
    assert torch.equal(unpack_bits(words, bits), values.to(torch.uint8))


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_layer_survives_a_round_trip(less_one: bool) -> None:
    weight = rounded(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)), 4, 32)
    back = unpack_layer(pack_layer(weight, less_one), 4, 32, less_one)
    assert torch.equal(back.integers, weight.integers)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zero_points, weight.zero_points)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_gptq_v1_zero_points_are_stored_minus_one() -> None:
    weight = rounded(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), 4, 32)
    assert {int(word) & 0xFFFFFFFF for word in pack_layer(weight, True)["qzeros"].flatten()} == {0x77777777}
    assert {int(word) & 0xFFFFFFFF for word in pack_layer(weight, False)["qzeros"].flatten()} == {0x88888888}


def test_width_of_partial_words_is_refused() -> None:
    with pytest.raises(ModelError, match="40 x 32"):
        pack_layer(rounded(torch.ones(40, 32), 4, 32), True)


def test_checkpoint_integers_survive_a_round_trip(tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")
    module = "model.layers.1.mlp.down_proj"
    expected = rounded(source.weight(module), 4, 32)
    assert torch.equal(quantized.weight(module), expected.dequantize())
    table = quantized.quantized("model.embed_tokens")
    assert table is not None
    assert table.integers.shape == (160, 64)
    assert torch.equal(table.dequantize(), rounded(source.weight("model.embed_tokens"), 4, 32).dequantize())
    assert quantized.quantized("model.norm") is None
