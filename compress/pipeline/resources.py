"""What a stage cost: wall time, that of its checks apart, and the largest resident memory seen meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import psutil

_EVERY_SECONDS = 0.05


class Meter:
    """A context manager that samples this process's resident memory every 50 ms.

    ``seconds`` are those within it, without the ``check_seconds`` within its `checking`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.check_seconds = 0.0
        self.peak_rss_bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.seconds = time.perf_counter() - self._started - self.check_seconds

    @contextmanager
    def checking(self) -> Iterator[None]:
        """What is looked at meanwhile is no part of the work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.check_seconds += time.perf_counter() - began

    def _look(self) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            self._look()
