"""Keeping other libraries' progress bars and notes off the terminal; this run says what it does itself."""

from __future__ import annotations

import functools
import warnings

from compress.formats.silence import put_off_torchao


@functools.cache
def quiet_libraries() -> None:
    """Errors and warnings of the libraries still come through their loggers; bars and load reports do not."""
    from transformers.utils import logging

    put_off_torchao()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Torch warns once about a profiler attribute of its own while tracing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
