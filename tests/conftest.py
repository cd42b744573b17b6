"""What all tests share: fixtures of pages that are looked at in a browser, and silence while torch traces."""

from __future__ import annotations

import logging
import os
import shutil
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ALONE = ("bench", "nightly")
"""Folders whose tests time things."""
# pytest listens to every logger, so that torch would write down each step of its tracing.
logging.getLogger("torch.__trace").disabled = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is not to run beside other tests."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in ALONE:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; in CI there must be one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium on PATH, and CI must have one")
    if found is None:
        pytest.skip("no Chromium on PATH")
    return found


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that answers nobody and records the first bytes of whoever asks: (port, requests)."""
    seen: list[bytes] = []

    class Recorder(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.recv(2000))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1], seen
        server.shutdown()
        thread.join()
