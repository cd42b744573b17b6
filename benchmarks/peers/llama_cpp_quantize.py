"""llama.cpp's own quantizer on an F32 GGUF file, called in the library of its release.

    PY peers/llama_cpp_quantize.py ORDER.json ANSWER.json

ORDER has `library` (libllama.so), `source`, `output` (files), `file_type` and `threads`; and `imatrix`, where there is
one: a safetensors file of [columns] by the names of the file's tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from quantizing import answer

_DEFAULTS = (0, 7, 0, 1, 0, 0)
"""Threads, Q8_0, and four of the switches: the struct is laid out as below."""


class _Importance(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("table_type", ctypes.c_int32),
        ("again", ctypes.c_bool),
        ("output", ctypes.c_bool),
        ("copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("rest", ctypes.c_uint8 * 512),
    ]


def run(order: dict[str, Any]) -> None:
    """What `llama-quantize [--imatrix IMATRIX] SOURCE OUTPUT FILE_TYPE THREADS` does."""
    from safetensors.numpy import load_file

    from compress.formats.gguf.file_types import FILE_TYPES

    library = ctypes.CDLL(order["library"])
    library.ggml_backend_load_all_from_path(str(Path(order["library"]).parent).encode())
    library.llama_backend_init()
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    parameters = library.llama_model_quantize_default_params()
    settings = (parameters.threads, parameters.file_type, *(bytes(parameters)[at] for at in range(16, 20)))
    if settings != _DEFAULTS:
        raise SystemExit(f"llama.cpp's settings are laid out otherwise: {settings}")
    parameters.threads, parameters.file_type = order["threads"], FILE_TYPES[order["file_type"]].number
    imatrix = load_file(order["imatrix"]) if "imatrix" in order else {}
    if imatrix:
        parameters.imatrix = _entries(imatrix)
    code = library.llama_model_quantize(order["source"].encode(), order["output"].encode(), ctypes.byref(parameters))
    if code != 0:
        raise SystemExit(f"llama_model_quantize ended with code {code}")


def _entries(found: Mapping[str, np.ndarray]) -> Any:
    """An importance matrix as llama.cpp takes it, which is read where it lies: an array that ends with nothing."""
    entries = (_Importance * (len(found) + 1))()
    for entry, (name, values) in zip(entries, found.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


if __name__ == "__main__":
    answer(run, (), ())
