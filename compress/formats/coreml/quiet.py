"""coremltools without its bars on the terminal, and without what its parts say as they are imported."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from compress.formats.quiet_torchao import quiet_torchao


@contextlib.contextmanager
def quiet_coreml() -> Iterator[Any]:
    """The package, which keeps silent meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            quiet_torchao(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            import coremltools

            yield coremltools
    finally:
        logging.disable(before)
