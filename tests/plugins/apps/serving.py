"""Helpers to serve a bundle's page and to check that it works offline and makes no external requests."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from compress.formats.onnx.runtimes.chromium import Page, open_page

OUTSIDE = "http://outside.invalid/x"
SHOWN = """Object.fromEntries([...document.querySelectorAll(".bar")].map((row) =>
  [row.children[0].textContent, parseFloat(row.children[2].textContent)]))"""


@contextmanager
def serve(folder: Path) -> Iterator[int]:
    """Serve a folder on the loopback address and yield the port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Discard log messages."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def go_offline(tab: Page) -> None:
    """Cut the tab's network connection."""
    tab.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)


def assert_asks_nobody(tab: Page, port: int) -> None:
    """Check that the page had no script errors and made no external requests, and that its policy blocks them."""
    assert tab.errors == []
    own = (f"http://127.0.0.1:{port}/", f"blob:http://127.0.0.1:{port}/", "data:")
    assert len(tab.requests) > 8
    assert [address for address in tab.requests if not address.startswith(own)] == []
    # The page's Content Security Policy blocks requests to other hosts before they are sent.
    tab.evaluate(f"fetch('{OUTSIDE}').catch(() => 0)")
    assert OUTSIDE not in tab.requests


@contextmanager
def open_bundle(folder: Path, chromium: str, until: str = "ready") -> Iterator[tuple[Page, int]]:
    """Serve a bundle's page, open it, wait for its ``data-`` attribute, and yield the tab and the port."""
    with serve(folder) as port, open_page(program=chromium) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{port}/index.html")
        tab.wait_for(f"document.body && document.body.dataset.{until}")
        yield tab, port
