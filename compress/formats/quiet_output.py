"""Suppression of the logs, warnings and prints of other packages."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

Extent = Literal["logs", "prints", "process"]
"""What is kept back: records below an error; warnings and whatever Python prints as well; and what other languages'
parts write to the process's error output.
"""
_TAKEN_FROM = "torchao.prototype.safetensors.safetensors_support"
_FUNCTION = "flatten_tensor_state_dict"


@contextlib.contextmanager
def suppress_output(extent: Extent) -> Iterator[Callable[[], str]]:
    """Suppress ``extent`` inside the context and yield a function that returns the error output so far."""
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        printed = io.StringIO()
        written = stack.enter_context(_error_output()) if extent == "process" else str
        if extent != "logs":
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(printed))
        yield lambda: f"{written()}{printed.getvalue()}"


@contextlib.contextmanager
def _error_output() -> Iterator[Callable[[], str]]:
    """Redirect the process's error output to a file and yield a function that returns its text so far."""
    sys.stderr.flush()
    saved_descriptor = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield lambda: os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(saved_descriptor, 2)
            os.close(saved_descriptor)


def defer_torchao_import() -> None:
    """Let transformers load without torchao, which it otherwise imports with the first model class or tokenizer.

    It takes one function from there, to save a model that torchao has quantized. That function still does so: it
    imports torchao, which ExecuTorch brings along, when it is called. Whoever imports torchao gets it unchanged.
    """
    if _TAKEN_FROM in sys.modules or find_spec("torchao") is None:
        return
    stand_in = ModuleType(_TAKEN_FROM)
    setattr(stand_in, _FUNCTION, _flatten)
    sys.modules[_TAKEN_FROM] = stand_in
    try:
        import transformers.quantizers.quantizer_torchao  # noqa: F401
    finally:
        # Left there, it would hide the real one from whoever imports that later.
        if sys.modules.get(_TAKEN_FROM) is stand_in:
            del sys.modules[_TAKEN_FROM]


def _flatten(*arguments: Any, **named: Any) -> Any:
    # As it is imported it warns of kernels for GPUs that it cannot load, and of its own calls of torch.
    with suppress_output("logs"):
        from torchao.prototype.safetensors import safetensors_support
    return getattr(safetensors_support, _FUNCTION)(*arguments, **named)


@functools.cache
def quiet_libraries() -> None:
    """Turn off progress bars and load reports of the libraries; their errors and warnings are still logged."""
    from transformers.utils import logging

    defer_torchao_import()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Torch warns once about a profiler attribute of its own while tracing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
