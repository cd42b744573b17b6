from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf_samples import write_tensors

from compress.formats.gguf.model import read_gguf
from compress.utils.errors import ModelError


def test_header_agrees_with_the_format_and_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_tensors(path)

    header = read_gguf(path)

    norm, up = header.tensors
    assert (norm.name, norm.dtype, norm.shape, norm.bytes) == ("blk.0.attn_norm.weight", "F32", (64,), 64 * 4)
    assert (up.dtype, up.shape) == ("Q8_0", (3, 64))
    assert up.bytes == 3 * 64 // 32 * 34  # a block of 32 weights: an fp16 scale and 32 int8
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.tokens"] == 3
    reference = GGUFReader(path).tensors
    assert [tensor.start for tensor in header.tensors] == [tensor.data_offset for tensor in reference]
    assert path.read_bytes()[norm.start : norm.start + norm.bytes] == reference[0].data.tobytes()


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.gguf")
    header = read_gguf(tmp_path / "x.gguf")
    needed = header.tensors[-1].start + header.tensors[-1].bytes
    whole = (tmp_path / "x.gguf").read_bytes()
    for length in (4, 7, 20, 60, header.tensors[0].start - 40, header.tensors[0].start, needed - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"truncated: it has {length} bytes"):
            read_gguf(tmp_path / "cut.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="letters GGUF"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ModelError, match="version is 1"):
        read_gguf(path)
    path.write_bytes(
        b"GGUF"
        + (3).to_bytes(4, "little")
        + (0).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + b"k"
        + (77).to_bytes(4, "little")
    )
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(path)
