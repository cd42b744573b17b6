"""What the libraries that stages call raise, and what it is to the user."""

from __future__ import annotations

from pathlib import Path

from compress.cache import disk_full
from compress.errors import CompressError, StageError


def library_failures() -> tuple[type[Exception], ...]:
    """What the libraries that stages call raise, beside file errors: those say what they mean in the cache."""
    from onnx.checker import ValidationError
    from safetensors import SafetensorError

    from compress.formats.onnx.runtimes.onnxruntime import FAILURES

    own = (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
    return (*own, ValidationError, SafetensorError, *FAILURES)


def unexpected(label: str, folder: Path, error: BaseException) -> CompressError:
    """A stage's failure with its label and how to go on; a full disk where that is what it was."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if "No space left on device" in str(error):
        return disk_full(folder)
    return StageError(
        f"Stage {label!r} failed: {type(error).__name__}: {first}",
        mend="see the run's log; finished stages are kept, so the next run resumes here",
    )
