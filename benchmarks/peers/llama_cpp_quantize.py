"""Quantization of a float32 GGUF file with llama.cpp's library.

    PY peers/llama_cpp_quantize.py ORDER.json ANSWER.json

ORDER has `library` (libllama.so), `source`, `output` (files), `file_type` and `threads`, and optionally `imatrix`: a
safetensors file with values [columns] by tensor name of the GGUF file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from quantizing import run_order

_DEFAULTS = (0, 7, 0, 1, 0, 0)
"""Expected default values of threads, file type and four flags, to check the layout of the struct below."""


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
    """Do the same as `llama-quantize [--imatrix IMATRIX] SOURCE OUTPUT FILE_TYPE THREADS`."""
    from gguf import LlamaFileType
    from safetensors.numpy import load_file

    library = ctypes.CDLL(order["library"])
    library.ggml_backend_load_all_from_path(str(Path(order["library"]).parent).encode())
    library.llama_backend_init()
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    parameters = library.llama_model_quantize_default_params()
    settings = (parameters.threads, parameters.file_type, *(bytes(parameters)[offset] for offset in range(16, 20)))
    if settings != _DEFAULTS:
        raise SystemExit(f"the layout of llama.cpp's settings is different: {settings}")
    parameters.threads, parameters.file_type = order["threads"], LlamaFileType[f"MOSTLY_{order['file_type']}"].value
    imatrix = load_file(order["imatrix"]) if "imatrix" in order else {}
    if imatrix:
        parameters.imatrix = _entries(imatrix)
    code = library.llama_model_quantize(order["source"].encode(), order["output"].encode(), ctypes.byref(parameters))
    if code != 0:
        raise SystemExit(f"llama_model_quantize ended with code {code}")


def _entries(imatrix: Mapping[str, np.ndarray]) -> Any:
    """Return an importance matrix as llama.cpp's null-terminated array, which refers to the memory of ``imatrix``."""
    entries = (_Importance * (len(imatrix) + 1))()
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


if __name__ == "__main__":
    run_order(run, (), ())
