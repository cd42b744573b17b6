"""ExecuTorch without the log of its C++ parts, some of which goes through Python and some does not."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

from compress.formats.quiet_torchao import quiet_torchao


@contextlib.contextmanager
def quiet_executorch() -> Iterator[Callable[[], str]]:
    """Nothing is printed meanwhile; the function that is given tells what the C++ parts would have said so far."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)

        printed = io.StringIO()

        def said() -> str:
            written = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
            return f"{written}{printed.getvalue()}"

        try:
            with (
                quiet_torchao(),
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(printed),
            ):
                warnings.simplefilter("ignore")
                yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
