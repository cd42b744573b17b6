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
"""Output to suppress.

`logs`: log records below errors. `prints`: also warnings and prints of Python. `process`: also the output of native
code to the process's error output.
"""
_TORCHAO_MODULE = "torchao.prototype.safetensors.safetensors_support"
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

    transformers needs one torchao function, which saves models that torchao quantized. ExecuTorch installs torchao. A
    replacement of that function imports torchao when it is called. Other importers of torchao get it unchanged.
    """
    if _TORCHAO_MODULE in sys.modules or find_spec("torchao") is None:
        return
    stand_in = ModuleType(_TORCHAO_MODULE)
    setattr(stand_in, _FUNCTION, _flatten)
    sys.modules[_TORCHAO_MODULE] = stand_in
    try:
        import transformers.quantizers.quantizer_torchao  # noqa: F401
    finally:
        # If it stayed there, the replacement would hide the real module from later imports.
        if sys.modules.get(_TORCHAO_MODULE) is stand_in:
            del sys.modules[_TORCHAO_MODULE]


def _flatten(*arguments: object, **options: object) -> Any:
    # At import torchao warns about GPU kernels that it cannot load and about its own deprecated calls of torch.
    with suppress_output("logs"):
        from torchao.prototype.safetensors import safetensors_support
    return getattr(safetensors_support, _FUNCTION)(*arguments, **options)


@functools.cache
def quiet_libraries() -> None:
    """Turn off progress bars and load reports of the libraries; their errors and warnings are still logged."""
    from transformers.utils import logging

    defer_torchao_import()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Torch warns once about a profiler attribute of its own while tracing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
