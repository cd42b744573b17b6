"""NNCF without its tables and bars on the terminal, and without its messages to Google Analytics."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_nncf() -> Iterator[Any]:
    """The package, which keeps silent meanwhile and tells nobody."""
    # Read when nncf is first imported: without it, every call is told.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield nncf
    finally:
        logging.disable(before)
