"""llama.cpp's C interface, called through ctypes.

The package xllamacpp contains the library. Its own Python classes are a server, which returns text and only the most
likely logits. The same file exports the functions of `llama.h`. The environment variable `COMPRESS_LLAMA_CPP` may
name another library, built for the local processor (libllama.so, with its backends beside it). Only the first fields
of the structs are written. Their default values show whether the layout is the expected one, so that another version
is refused and never misread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from compress.utils.errors import InputError, MissingExtraError, ModelError, StageError, install_command
from compress.utils.storage import digest_file

PACKAGE = "xllamacpp"
EXTRA = "llama-cpp"
VERSION = "2026.10.11549"
"""Build whose structs have the layout below."""
VARIABLE = "COMPRESS_LLAMA_CPP"
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4,
}  # fmt: skip
"""First fields of a context's parameters, which have 32 bits each, with llama.cpp's default values."""
EVERY = 2**31 - 1
"""Number of answers that includes every token of a call."""
_ERROR_LEVEL = 4
_ROOM_BYTES = 512
"""Size above that of any version of the structs; bytes behind the fields are passed on unchanged."""


class _ContextParameters(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in _CONTEXT_DEFAULTS), ("rest", ctypes.c_uint8 * _ROOM_BYTES)]


class _ModelParameters(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * _ROOM_BYTES),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER = ctypes.c_void_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "ggml_backend_load_all_from_path": (None, (ctypes.c_char_p,)),
    "llama_context_default_params": (_ContextParameters, ()),
    "llama_model_default_params": (_ModelParameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelParameters)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_n_ctx_train": (ctypes.c_int32, (_POINTER,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParameters)),
    "llama_free": (None, (_POINTER,)),
    "llama_n_ctx": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_batch": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_threads": (ctypes.c_int32, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (ctypes.c_int32, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
    "llama_print_system_info": (ctypes.c_char_p, ()),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (
            *(ctypes.c_int, ctypes.POINTER(ctypes.c_float), _POINTER),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_float)),
        ),
    ),
    "llama_tokenize": (
        ctypes.c_int32,
        (
            *(_POINTER, ctypes.c_char_p, ctypes.c_int32),
            *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
    ),
}
_errors: deque[str] = deque(maxlen=4)


def _collect_error(level: int, text: bytes, _: object) -> None:
    if level == _ERROR_LEVEL:
        _errors.append(text.decode(errors="replace").strip())


_LISTENER = _LOG(_collect_error)
"""Log callback, referenced here because llama.cpp calls it as long as the process lives."""


def why_missing() -> str | None:
    """Return the reason why llama.cpp cannot be called on this machine, or ``None``."""
    custom_library = os.environ.get(VARIABLE)
    if custom_library:
        return None if Path(custom_library).is_file() else f"{VARIABLE} names {custom_library}, which is no file"
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"the package {PACKAGE} is not installed; {install_command(EXTRA)}"
    if installed != VERSION:
        return f"{PACKAGE} {installed} is installed, whose C interface may be another than that of {VERSION}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, with logging to stderr turned off.

    Raises:
        MissingExtraError: No library is installed.
        InputError: The environment variable names no llama.cpp library.
        StageError: The library has another version.
    """
    custom_library = packaged_library = os.environ.get(VARIABLE)
    if not custom_library:
        if why_missing() is not None:
            raise MissingExtraError(f"{PACKAGE}=={VERSION}", EXTRA, "The target 'llama-cpp'")
        import xllamacpp

        packaged_library = str(xllamacpp.xllamacpp.__file__)
    try:
        loaded = ctypes.CDLL(packaged_library)
        for name, (result_type, argument_types) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result_type, argument_types
    except (OSError, AttributeError) as error:
        raise InputError(
            f"{VARIABLE} names no llama.cpp: {error}.", where=custom_library, expected="the path of libllama.so"
        ) from error
    # llama.cpp writes to stderr by default. The callback keeps the last errors for messages.
    loaded.llama_log_set(_LISTENER, None)
    defaults = loaded.llama_context_default_params()
    values = {name: getattr(defaults, name) for name in _CONTEXT_DEFAULTS}
    if values != _CONTEXT_DEFAULTS:
        raise StageError(
            f"llama.cpp's settings are laid out otherwise than in {PACKAGE} {VERSION}: {values}.",
            where=os.environ.get(VARIABLE),
            expected=str(_CONTEXT_DEFAULTS),
            hint=f"unset {VARIABLE} and pip install '{PACKAGE}=={VERSION}'",
        )
    if custom_library:
        loaded.ggml_backend_load_all_from_path(str(Path(custom_library).absolute().parent).encode())
    loaded.llama_backend_init()
    return loaded


def build() -> str:
    """Return the package's version, or the digest of a custom library and of its backends."""
    custom_library = os.environ.get(VARIABLE)
    if not custom_library:
        return VERSION
    backends = sorted(Path(custom_library).absolute().parent.glob("libggml*"))
    digests = "".join(digest_file(file) for file in (Path(custom_library), *backends))
    return hashlib.sha256(digests.encode()).hexdigest()


def describe() -> dict[str, str]:
    """Return the library in use and the processor features that it detected, such as AVX512_VNNI."""
    text: bytes = library().llama_print_system_info()
    custom_library = os.environ.get(VARIABLE)
    source = Path(custom_library).name if custom_library else f"{PACKAGE} {VERSION}"
    return {"runtime": f"llama.cpp in {source}", "processor": text.decode().strip()}


class LlamaModel:
    """Weights and vocabulary of a GGUF file on the processor."""

    def __init__(self, file: Path) -> None:
        """Load ``file``; raise `ModelError` with llama.cpp's message on failure."""
        self._library = library()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        _errors.clear()
        self.pointer = self._library.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.pointer:
            raise ModelError(
                f"llama.cpp cannot open the model: {'; '.join(_errors) or 'it gives no reason'}",
                where=str(file),
                hint="write the file again, or take one of an architecture that llama.cpp knows",
            )
        self._vocabulary = self._library.llama_model_get_vocab(self.pointer)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self.positions = int(self._library.llama_model_n_ctx_train(self.pointer))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of ``text`` without added tokens; ``special`` parses the names of special tokens."""
        encoded = text.encode()
        # There is at most one token per byte, and a few special ones.
        room = (ctypes.c_int32 * (len(encoded) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, encoded, len(encoded), room, len(room), False, special)
        return list(room[:count])

    def __del__(self) -> None:
        """Free the weights."""
        if getattr(self, "pointer", None):
            self._library.llama_model_free(self.pointer)
            self.pointer = None


class LlamaContext:
    """Key-value cache of one sequence, with memory for the logits of the last ``answers`` tokens of a call."""

    def __init__(self, model: LlamaModel, length: int, threads: int, answers: int = 1) -> None:
        """Allocate a cache for ``length`` tokens.

        Args:
            model: Loaded weights.
            length: Number of tokens.
            threads: Number of threads.
            answers: Number of tokens per call whose logits are returned.

        Raises:
            StageError: llama.cpp cannot allocate the cache.
        """
        self._library, self._model, self._answers = library(), model, answers
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_batch = parameters.n_ubatch = min(length, _CONTEXT_DEFAULTS["n_ubatch"])
        if answers > 1:
            parameters.n_outputs_max = parameters.n_outputs_max_per_seq = min(answers, parameters.n_batch)
        _errors.clear()
        self.pointer = self._library.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise StageError(
                f"llama.cpp has no room for {length} tokens: {'; '.join(_errors) or 'it gives no reason'}",
                hint="free some memory, or take a shorter context",
            )
        self.length = int(self._library.llama_n_ctx(self.pointer))
        self._most = int(self._library.llama_n_batch(self.pointer))
        actual_threads = int(self._library.llama_n_threads(self.pointer))
        if self.length < length or actual_threads != threads:
            actual = f"{self.length} tokens and {actual_threads} threads"
            raise StageError(f"llama.cpp took {actual} for {length} and {threads}.")

    def clear(self) -> None:
        """Discard the keys and values of the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self.pointer), False)

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Run ``ids`` after the previous ones and return a copy of the logits [last tokens, vocabulary].

        Raises:
            StageError: llama.cpp fails; the error contains its message.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        answered = np.arange(len(ids)) >= len(ids) - self._answers
        # llama.cpp runs at most `n_batch` tokens per call.
        pieces = [slice(start, start + self._most) for start in range(0, len(ids), self._most)]
        return np.concatenate([self._run(ids[piece], answered[piece]) for piece in pieces])

    def _run(self, ids: np.ndarray, answered: np.ndarray) -> np.ndarray:
        requested = answered.copy()
        requested[-1] = True  # llama.cpp takes no batch that is asked for nothing
        # `logits` flags the tokens whose logits are computed.
        flags = requested.astype(np.int8)
        tokens = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch = _Batch(len(ids), tokens, logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)))
        _errors.clear()
        code = self._library.llama_decode(self.pointer, batch)
        if code != 0:
            reason = "; ".join(_errors) or "no reason"
            raise StageError(f"llama.cpp failed on {len(ids)} tokens (code {code}): {reason}")
        logits = self._library.llama_get_logits(self.pointer)
        view = np.ctypeslib.as_array(logits, (int(requested.sum()), self._model.vocabulary))
        copied: np.ndarray = view[answered[requested]]  # a copy
        return copied

    def __del__(self) -> None:
        """Free the context."""
        if getattr(self, "pointer", None):
            self._library.llama_free(self.pointer)
            self.pointer = None
