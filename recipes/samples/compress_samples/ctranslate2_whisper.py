"""Conversion of a Whisper model in CTranslate2's format to a Hugging Face folder with the same float16 weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import save_file

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

_VERSION = 6
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_LARGEST = 1 << 31
"""Largest size of a tensor in bytes; a larger value means that the file is damaged."""
_ENGLISH_VOCABULARY = 51864
_START, _END, _NO_TIMESTAMPS, _PREVIOUS = 50257, 50256, 50362, 50360
"""`<|startoftranscript|>`, `<|endoftext|>`, `<|notimestamps|>` and `<|startofprev|>` of the English models."""
_SECONDS, _RATE, _HOP, _WINDOW = 30, 16_000, 160, 400
_POSITIONS, _TOKENS = 1500, 448

Arrays = Mapping[str, np.ndarray]


def write_whisper(members: Path, files: Path, progress: Progress) -> None:
    """Write weights, config, generation config, tokenizer and feature extractor of an English model.

    Raises `SampleError` if model.bin is not such a model.
    """
    arrays = read_model(members / "model.bin")
    tensors = hugging_face_tensors(arrays)
    source = json.loads((members / "config.json").read_text(encoding="utf-8"))
    save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(members / "tokenizer.json", files / "tokenizer.json")
    written = {
        "config.json": _config(arrays),
        "generation_config.json": _generation_config(source),
        "preprocessor_config.json": _feature_extractor(arrays),
        "tokenizer_config.json": _tokenizer(),
    }
    for name, content in written.items():
        (files / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    total = sum(tensor.size for tensor in tensors.values())
    progress.note(f"whisper-tiny-en: {len(tensors)} tensors, {total:,} parameters in float16")


def read_model(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a Whisper model in a CTranslate2 `model.bin` of version 6. Raises `SampleError`."""
    with path.open("rb") as file:
        try:
            version, kind = _integer(file, "I"), _text(file)
            if version != _VERSION or kind != "WhisperSpec":
                raise SampleError(
                    f"{path.name} holds a {kind} of version {version}.", expected=f"WhisperSpec of version {_VERSION}"
                )
            _integer(file, "I")  # the revision of the specification
            return dict(_entries(file))
        except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
            raise SampleError(f"{path.name} is not a complete CTranslate2 model: {error}") from error


def hugging_face_tensors(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the weights in float16 with the tensor names of transformers' `WhisperForConditionalGeneration`."""
    named: dict[str, np.ndarray] = {"model.decoder.embed_tokens.weight": arrays["decoder/embeddings/weight"]}
    for side in ("encoder", "decoder"):
        named[f"model.{side}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"]
        named |= _norm(f"model.{side}.layer_norm", arrays, f"{side}/layer_norm")
        for layer in range(_layers(arrays, side)):
            named |= _layer(f"model.{side}.layers.{layer}", arrays, f"{side}/layer_{layer}", side == "decoder")
    for conv in ("conv1", "conv2"):
        named |= _linear(f"model.encoder.{conv}", arrays, f"encoder/{conv}")
    return {name: np.ascontiguousarray(array, dtype=np.float16) for name, array in named.items()}


def _layer(name: str, arrays: Arrays, source: str, has_cross_attention: bool) -> dict[str, np.ndarray]:
    attention = f"{source}/self_attention"
    weights = _projections(f"{name}.self_attn", "qkv", arrays, f"{attention}/linear_0")
    weights |= _linear(f"{name}.self_attn.out_proj", arrays, f"{attention}/linear_1")
    weights |= _norm(f"{name}.self_attn_layer_norm", arrays, f"{attention}/layer_norm")
    weights |= _norm(f"{name}.final_layer_norm", arrays, f"{source}/ffn/layer_norm")
    for index in (0, 1):
        weights |= _linear(f"{name}.fc{index + 1}", arrays, f"{source}/ffn/linear_{index}")
    if has_cross_attention:
        other = f"{source}/attention"
        weights |= _linear(f"{name}.encoder_attn.q_proj", arrays, f"{other}/linear_0")
        weights |= _projections(f"{name}.encoder_attn", "kv", arrays, f"{other}/linear_1")
        weights |= _linear(f"{name}.encoder_attn.out_proj", arrays, f"{other}/linear_2")
        weights |= _norm(f"{name}.encoder_attn_layer_norm", arrays, f"{other}/layer_norm")
    return weights


def _projections(name: str, kinds: str, arrays: Arrays, source: str) -> dict[str, np.ndarray]:
    """Split a fused projection [parts * width, width] into queries, keys and values. Keys have no bias."""
    weights = np.split(arrays[f"{source}/weight"], len(kinds))
    biases = np.split(arrays[f"{source}/bias"], len(kinds))
    tensors = {f"{name}.{kind}_proj.weight": weight for kind, weight in zip(kinds, weights, strict=True)}
    tensors |= {f"{name}.{kind}_proj.bias": bias for kind, bias in zip(kinds, biases, strict=True)}
    if tensors.pop(f"{name}.k_proj.bias").any():
        raise SampleError(f"The keys of {source} have a bias, unlike those of Whisper.")
    return tensors


def _linear(name: str, arrays: Arrays, source: str) -> dict[str, np.ndarray]:
    return {f"{name}.{part}": arrays[f"{source}/{part}"] for part in ("weight", "bias")}


def _norm(name: str, arrays: Arrays, source: str) -> dict[str, np.ndarray]:
    return {f"{name}.weight": arrays[f"{source}/gamma"], f"{name}.bias": arrays[f"{source}/beta"]}


def _layers(arrays: Arrays, side: str) -> int:
    parts = (name.split("/") for name in arrays if name.startswith(f"{side}/layer_"))
    return len({part[1] for part in parts if part[1] != "layer_norm"})


def _entries(file: IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    for _ in range(_integer(file, "I")):
        name = _text(file)
        shape = [_integer(file, "I") for _ in range(_integer(file, "B"))]
        dtype = _TYPES[_integer(file, "B")]
        size = _integer(file, "I")
        if size > _LARGEST:
            raise ValueError(f"{name} would have {size:,} bytes")
        yield name, np.frombuffer(file.read(size), dtype).reshape(shape)


def _integer(file: IO[bytes], form: str) -> int:
    value: int = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
    return value


def _text(file: IO[bytes]) -> str:
    """Read a string with a length prefix and a trailing zero byte."""
    return file.read(_integer(file, "H"))[:-1].decode()


def _config(arrays: Arrays) -> dict[str, Any]:
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    if vocabulary != _ENGLISH_VOCABULARY:
        raise SampleError(f"The model has {vocabulary} tokens.", expected=f"{_ENGLISH_VOCABULARY}, a model for English")
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": arrays["encoder/conv1/weight"].shape[1],
        "max_source_positions": _POSITIONS,
        "max_target_positions": _TOKENS,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "decoder_start_token_id": _START,
        "bos_token_id": _START,
        "eos_token_id": _END,
        "pad_token_id": _END,
        "dtype": "float16",
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_layers"] = _layers(arrays, side)
        config[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"].reshape(-1)[0])
        config[f"{side}_ffn_dim"] = arrays[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    return config


def _generation_config(source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "alignment_heads": source["alignment_heads"],
        "begin_suppress_tokens": source["suppress_ids_begin"],
        "suppress_tokens": source["suppress_ids"],
        "decoder_start_token_id": _START,
        "bos_token_id": _START,
        "eos_token_id": _END,
        "pad_token_id": _END,
        "forced_decoder_ids": [[1, _NO_TIMESTAMPS]],
        "no_timestamps_token_id": _NO_TIMESTAMPS,
        "prev_sot_token_id": _PREVIOUS,
        "is_multilingual": False,
        "max_initial_timestamp_index": 50,
        "max_length": _TOKENS,
        "return_timestamps": False,
    }


def _feature_extractor(arrays: Arrays) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": arrays["encoder/conv1/weight"].shape[1],
        "sampling_rate": _RATE,
        "chunk_length": _SECONDS,
        "n_samples": _SECONDS * _RATE,
        "nb_max_frames": _SECONDS * _RATE // _HOP,
        "hop_length": _HOP,
        "n_fft": _WINDOW,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _tokenizer() -> dict[str, Any]:
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
