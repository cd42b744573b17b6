"""llama.cpp's C interface, called by ctypes.

It comes with the package xllamacpp, whose own Python classes are a server: they answer with text and no logits but the
likeliest few. The functions of `llama.h` are exported by the same file. A library of one's own, built for the processor
at hand, is taken instead where `COMPRESS_LLAMA_CPP` names it (libllama.so, its backends beside it). Only the first
fields of the structs are written; that they are where they are expected is read off their defaults, so that another
version is refused and never misread.
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

from compress.utils.errors import InputError, MissingExtraError, ModelError, StageError
from compress.utils.storage import digest_file

PACKAGE = "xllamacpp"
EXTRA = "llama-cpp"
VERSION = "2026.10.11549"
"""The build whose structs are laid out as below."""
VARIABLE = "COMPRESS_LLAMA_CPP"
_CONTEXT_DEFAULTS = (512, 2048, 512, 1, 0, 0, 1, 4, 4)
EVERY = 2**31 - 1
"""As many answers as a call has tokens."""
_ERROR_LEVEL = 4
_ROOM_BYTES = 512
"""More than any version of the structs takes; what lies behind the fields is passed on as it came."""


class _ContextParameters(ctypes.Structure):
    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * _ROOM_BYTES),
    ]


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
_said: deque[str] = deque(maxlen=4)


def _keep(level: int, text: bytes, _: object) -> None:
    if level == _ERROR_LEVEL:
        _said.append(text.decode(errors="replace").strip())


_LISTENER = _LOG(_keep)
"""CollectedOutputs here, since llama.cpp calls it as long as the process lives."""


def why_missing() -> str | None:
    """Return the reason why llama.cpp cannot be called on this machine, or ``None``."""
    own = os.environ.get(VARIABLE)
    if own:
        return None if Path(own).is_file() else f"{VARIABLE} names {own}, which is no file"
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return f"the package {PACKAGE} is not installed; pip install 'compress[{EXTRA}]'"
    if found != VERSION:
        return f"{PACKAGE} {found} is installed, whose C interface may be another than that of {VERSION}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with logging turned off.

    Raises `MissingExtraError` without one, `InputError` for a file that is none, `StageError` for another version.
    """
    own = os.environ.get(VARIABLE)
    try:
        loaded = ctypes.CDLL(own or _packaged())
        for name, (gives, takes) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = gives, takes
    except (OSError, AttributeError) as error:
        raise InputError(
            f"{VARIABLE} names no llama.cpp: {error}.", where=own, expected="the path of libllama.so"
        ) from error
    loaded.llama_log_set(_LISTENER, None)
    _check_layout(loaded)
    if own:
        loaded.ggml_backend_load_all_from_path(str(Path(own).absolute().parent).encode())
    loaded.llama_backend_init()
    return loaded


def _packaged() -> str:
    if why_missing() is not None:
        raise MissingExtraError(f"{PACKAGE}=={VERSION}", EXTRA, "The target 'llama-cpp'")
    import xllamacpp

    return str(xllamacpp.xllamacpp.__file__)


def _check_layout(loaded: ctypes.CDLL) -> None:
    defaults = loaded.llama_context_default_params()
    found = tuple(getattr(defaults, name) for name, *_ in _ContextParameters._fields_[:-1])
    if found != _CONTEXT_DEFAULTS:
        raise StageError(
            f"llama.cpp's settings are laid out otherwise than in {PACKAGE} {VERSION}: {found}.",
            where=os.environ.get(VARIABLE),
            expected=str(_CONTEXT_DEFAULTS),
            hint=f"unset {VARIABLE} and pip install '{PACKAGE}=={VERSION}'",
        )


def build() -> str:
    """Return the package's version, or the digest of a custom library and of its backends."""
    own = os.environ.get(VARIABLE)
    if not own:
        return VERSION
    backends = sorted(Path(own).absolute().parent.glob("libggml*"))
    total = hashlib.sha256()
    for file in (Path(own), *backends):
        total.update(digest_file(file).encode())
    return total.hexdigest()


def describe() -> dict[str, str]:
    """Return the library in use and the processor features that it detected, such as AVX512_VNNI."""
    text: bytes = library().llama_print_system_info()
    own = os.environ.get(VARIABLE)
    return {
        "runtime": f"llama.cpp in {Path(own).name}" if own else f"llama.cpp in {PACKAGE} {VERSION}",
        "processor": text.decode().strip(),
    }


class LlamaModel:
    """Weights and vocabulary of a GGUF file, on the processor."""

    def __init__(self, file: Path) -> None:
        """Load ``file``. Raises `ModelError` with llama.cpp's own words."""
        self._library = library()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        _said.clear()
        self.pointer = self._library.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.pointer:
            raise ModelError(
                f"llama.cpp cannot open the model: {'; '.join(_said) or 'it gives no reason'}",
                where=str(file),
                hint="write the file again, or take one of an architecture that llama.cpp knows",
            )
        self._vocabulary = self._library.llama_model_get_vocab(self.pointer)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self.positions = int(self._library.llama_model_n_ctx_train(self.pointer))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text`` without a token before or after it; ``special``: names of special tokens are read as such."""
        encoded = text.encode()
        room = (ctypes.c_int32 * (len(encoded) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, encoded, len(encoded), room, len(room), False, special)
        return list(room[:count])

    def __del__(self) -> None:
        """Free the weights."""
        if getattr(self, "pointer", None):
            self._library.llama_model_free(self.pointer)
            self.pointer = None


class LlamaContext:
    """Keys and values of one sequence, and room for the logits of the last ``answers`` tokens of a call."""

    def __init__(self, model: LlamaModel, length: int, threads: int, answers: int = 1) -> None:
        """Make room for ``length`` tokens. Raises `StageError` where llama.cpp cannot."""
        self._library, self._model, self._answers = library(), model, answers
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_batch = parameters.n_ubatch = min(length, _CONTEXT_DEFAULTS[2])
        if answers > 1:
            parameters.n_outputs_max = parameters.n_outputs_max_per_seq = min(answers, parameters.n_batch)
        _said.clear()
        self.pointer = self._library.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise StageError(
                f"llama.cpp has no room for {length} tokens: {'; '.join(_said) or 'it gives no reason'}",
                hint="free some memory, or take a shorter context",
            )
        self.length = int(self._library.llama_n_ctx(self.pointer))
        self._most = int(self._library.llama_n_batch(self.pointer))
        taken = int(self._library.llama_n_threads(self.pointer))
        if self.length < length or taken != threads:
            raise StageError(f"llama.cpp took {self.length} tokens and {taken} threads for {length} and {threads}.")

    def clear(self) -> None:
        """Discard the keys and values of the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self.pointer), False)

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Run ``ids`` after what was run before; logits [the last of them, vocabulary], which are the caller's own.

        Raises `StageError` with llama.cpp's words where it fails.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        wanted = np.arange(len(ids)) >= len(ids) - self._answers
        pieces = [slice(start, start + self._most) for start in range(0, len(ids), self._most)]
        return np.concatenate([self._run(ids[piece], wanted[piece]) for piece in pieces])

    def _run(self, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        told = wanted.copy()
        told[-1] = True  # llama.cpp takes no batch that is asked for nothing
        flags = told.astype(np.int8)
        batch = _Batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        _said.clear()
        code = self._library.llama_decode(self.pointer, batch)
        if code != 0:
            raise StageError(f"llama.cpp failed on {len(ids)} tokens (code {code}): {'; '.join(_said) or 'no reason'}")
        logits = self._library.llama_get_logits(self.pointer)
        view = np.ctypeslib.as_array(logits, (int(told.sum()), self._model.vocabulary))
        found: np.ndarray = view[wanted[told]]  # a copy
        return found

    def __del__(self) -> None:
        """Free the context."""
        if getattr(self, "pointer", None):
            self._library.llama_free(self.pointer)
            self.pointer = None
