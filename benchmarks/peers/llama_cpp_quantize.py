"""llama.cpp's own quantizer on an F32 GGUF file, called in the library of its release.

    PY peers/llama_cpp_quantize.py ORDER.json ANSWER.json

ORDER has `library` (libllama.so), `source`, `output` (files), `file_type` and `threads`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from quantizing import answer

FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}
"""llama_ftype, as `llama-quantize` names them."""


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 512),
    ]


def run(order: dict[str, Any]) -> None:
    """What `llama-quantize SOURCE OUTPUT FILE_TYPE THREADS` does."""
    library = ctypes.CDLL(order["library"])
    library.ggml_backend_load_all_from_path(str(Path(order["library"]).parent).encode())
    library.llama_backend_init()
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = order["threads"], FILE_TYPES[order["file_type"]]
    code = library.llama_model_quantize(order["source"].encode(), order["output"].encode(), ctypes.byref(parameters))
    if code != 0:
        raise SystemExit(f"llama_model_quantize ended with code {code}")


if __name__ == "__main__":
    answer(run, (), ())
