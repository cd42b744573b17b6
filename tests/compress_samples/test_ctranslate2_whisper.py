"""Tests of CTranslate2 conversion: a hand-written model compared with the tensors of the Hugging Face model."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from compress.utils.errors import SampleError
from compress_samples.ctranslate2_whisper import hugging_face_tensors, read_model

WIDTH, TYPES = 8, {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write(path: Path, arrays: dict[str, np.ndarray], version: int = 6) -> None:
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", TYPES[array.dtype], array.nbytes), array.tobytes()]
    path.write_bytes(b"".join(parts))


def model() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float16)

    def linear(name: str, rows: int, columns: int = WIDTH) -> dict[str, np.ndarray]:
        return {f"{name}/weight": random(rows, columns), f"{name}/bias": random(rows)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/gamma": random(WIDTH), f"{name}/beta": random(WIDTH)}

    arrays = {"decoder/embeddings/weight": random(20, WIDTH)}
    for conv, channels in (("conv1", 5), ("conv2", WIDTH)):
        arrays |= {f"encoder/{conv}/weight": random(WIDTH, channels, 3), f"encoder/{conv}/bias": random(WIDTH)}
    for side in ("encoder", "decoder"):
        arrays |= {f"{side}/position_encodings/encodings": random(6, WIDTH), **norm(f"{side}/layer_norm")}
        layer = f"{side}/layer_0"
        attention = linear(f"{layer}/self_attention/linear_0", 3 * WIDTH)
        attention[f"{layer}/self_attention/linear_0/bias"][WIDTH : 2 * WIDTH] = 0
        arrays |= (
            attention | linear(f"{layer}/self_attention/linear_1", WIDTH) | norm(f"{layer}/self_attention/layer_norm")
        )
        arrays |= linear(f"{layer}/ffn/linear_0", 16) | linear(f"{layer}/ffn/linear_1", WIDTH, 16)
        arrays |= norm(f"{layer}/ffn/layer_norm")
    other = "decoder/layer_0/attention"
    keys = linear(f"{other}/linear_1", 2 * WIDTH)
    keys[f"{other}/linear_1/bias"][:WIDTH] = 0
    return (
        arrays
        | keys
        | linear(f"{other}/linear_0", WIDTH)
        | linear(f"{other}/linear_2", WIDTH)
        | norm(f"{other}/layer_norm")
    )


def test_tensors_are_read_as_written(tmp_path: Path):
    write(tmp_path / "model.bin", model())
    arrays = read_model(tmp_path / "model.bin")
    assert arrays.keys() == model().keys()
    assert all((arrays[name] == array).all() for name, array in model().items())


def test_names_and_shapes_equal_transformers(tmp_path: Path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=20, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=5, max_source_positions=6,
        max_target_positions=6, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    expected = {name: tensor.shape for name, tensor in WhisperForConditionalGeneration(config).state_dict().items()}
    expected.pop("proj_out.weight")
    assert {name: array.shape for name, array in hugging_face_tensors(model()).items()} == expected


def test_fused_attention_is_split_into_query_key_value():
    arrays, tensors = model(), hugging_face_tensors(model())
    whole = arrays["encoder/layer_0/self_attention/linear_0/weight"]
    parts = [tensors[f"model.encoder.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"]
    assert (np.concatenate(parts) == whole).all()
    other = [tensors[f"model.decoder.layers.0.encoder_attn.{kind}_proj.weight"] for kind in "kv"]
    assert (np.concatenate(other) == arrays["decoder/layer_0/attention/linear_1/weight"]).all()


def test_nonzero_key_bias_is_rejected():
    arrays = model()
    arrays["encoder/layer_0/self_attention/linear_0/bias"][WIDTH + 1] = 1
    with pytest.raises(SampleError, match="bias"):
        hugging_face_tensors(arrays)


@pytest.mark.parametrize("cut", [3, 40, 200])
def test_truncated_file_is_rejected(tmp_path: Path, cut: int):
    path = tmp_path / "model.bin"
    write(path, model())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SampleError, match=r"model\.bin"):
        read_model(path)


def test_other_version_is_rejected(tmp_path: Path):
    write(tmp_path / "model.bin", model(), version=5)
    with pytest.raises(SampleError, match="version 5"):
        read_model(tmp_path / "model.bin")
