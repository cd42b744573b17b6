"""What a stage cost: wall time, that of its checks apart, and the largest resident memory seen meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_EVERY_SECONDS = 0.05


@dataclass
class Meter:
    """Time and peak memory of a piece of work; ``seconds`` excludes ``check_seconds``, the time within `checking`."""

    seconds: float = 0.0
    check_seconds: float = 0.0
    peak_rss_bytes: int = 0

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Exclude the time within this context from the work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.check_seconds += time.perf_counter() - began


@contextmanager
def metered() -> Iterator[Meter]:
    """Sample this process's resident memory every 50 ms."""
    meter, process, stop, began = Meter(), psutil.Process(), threading.Event(), time.perf_counter()

    def look() -> None:
        meter.peak_rss_bytes = max(meter.peak_rss_bytes, process.memory_info().rss)

    def sample() -> None:
        while not stop.wait(_EVERY_SECONDS):
            look()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        look()
        meter.seconds = time.perf_counter() - began - meter.check_seconds
