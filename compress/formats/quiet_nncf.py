"""NNCF without its tables and bars on the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_nncf() -> Iterator[Any]:
    """The package, which keeps silent meanwhile."""
    import nncf

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield nncf
    finally:
        logging.disable(before)
