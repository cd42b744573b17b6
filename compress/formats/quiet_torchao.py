"""torchao, which ExecuTorch brings along: imported when something calls it, and without its notes on the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TAKEN_FROM = "torchao.prototype.safetensors.safetensors_support"
_FUNCTION = "flatten_tensor_state_dict"


def put_off_torchao() -> None:
    """Let transformers load without torchao, which it otherwise imports with the first model class or tokenizer.

    It takes one function from there, to save a model that torchao has quantized. That function still does so: it
    imports torchao when it is called. Whoever imports torchao gets it unchanged.
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
    with quiet_torchao():
        from torchao.prototype.safetensors import safetensors_support
    return getattr(safetensors_support, _FUNCTION)(*arguments, **named)


@contextlib.contextmanager
def quiet_torchao() -> Iterator[None]:
    """While it is imported: it warns of kernels for GPUs that it cannot load, and of its own calls of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
