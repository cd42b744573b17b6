"""Headless Chromium that renders a page at any width and in either color scheme, without network access."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.formats.onnx.runtimes.chromium import Page, open_page

BOX = "const box = (node) => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };"
"""JavaScript helper for probes: the screen rectangle [left, top, right, bottom] of an element."""
_OWN = re.compile(r"^(?!fonts)[\w-]+\.(google\.com|googleapis\.com|gvt1\.com)$|^start\.duckduckgo\.com$")
"""Hosts of Chromium's own update and time services, and Debian's default start page."""


@dataclass(frozen=True)
class Seen:
    """The result of the probe, the messages in the page's console, and the hosts that were requested."""

    found: Any
    said: list[str]
    asked: list[str]


class Browser:
    """A browser tab that shows one page at a time.

    All requests go to a proxy that answers none of them and records them in ``heard``.
    """

    def __init__(self, tab: Page, folder: Path, heard: list[bytes]) -> None:
        self._tab, self._folder, self._heard = tab, folder, heard
        self._said: list[str] = []
        messages = tab._messages

        def listen(deadline: float) -> Iterator[dict[str, Any]]:
            for message in messages(deadline):
                parameters = message.get("params", {})
                match message.get("method"):
                    case "Log.entryAdded":
                        self._said.append(parameters["entry"]["text"])
                    case "Runtime.consoleAPICalled":
                        self._said.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
                    case "Runtime.exceptionThrown":
                        self._said.append(tab.errors[-1])
                yield message

        tab._messages = listen  # type: ignore[method-assign]
        tab.call("Log.enable")

    def look(self, content: str, probe: str = "null", width: int = 1280, height: int = 900, dark: bool = False) -> Seen:
        """Load a page with its own content security policy and evaluate ``probe``.

        ``probe`` is a JavaScript expression, or a block with a return statement.
        The rendered document is available as `document.documentElement.outerHTML`.
        """
        page = self._folder / "page.html"
        page.write_text(content, encoding="utf-8")
        tab = self._tab
        tab.call("Page.navigate", url="about:blank")
        self._said.clear()
        self._heard.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        tab.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.call("Page.navigate", url=page.as_uri())
        tab.wait_for(f"document.readyState === 'complete' && location.href === {page.as_uri()!r}")
        value = tab.evaluate(f"(() => {{ {BOX} {probe if 'return ' in probe else f'return {probe}'} }})()")
        # All messages and requests of the page load have arrived once two frames are drawn.
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        asked = [request.split(b" ", 2)[1].decode() for request in self._heard if request.count(b" ") >= 2]
        hosts = [re.sub(r"^\w+://|[:/].*$", "", address.split("://")[-1]) for address in asked]
        return Seen(value, list(self._said), [host for host in hosts if not _OWN.match(host)])


@contextmanager
def open_browser(chromium: str, folder: Path) -> Iterator[Browser]:
    """Open a browser that can reach only a local proxy; it writes its pages into ``folder``."""
    heard: list[bytes] = []

    class Recorder(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            heard.append(self.request.recv(2000))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        options = (f"--proxy-server=http://127.0.0.1:{proxy.server_address[1]}", "--proxy-bypass-list=<-loopback>")
        with open_page(*options, program=chromium) as tab:
            yield Browser(tab, folder, heard)
        proxy.shutdown()
        thread.join()


def covered(labels: list[tuple[str, float, float, float, float]], most_down: float = 4.0) -> list[str]:
    """Return a message for each pair of labels [text, left, top, right, bottom] that overlap.

    A vertical overlap of up to ``most_down`` pixels is allowed, because a glyph's box has empty space above it.
    """
    overlaps = []
    for index, (name, left, top, right, bottom) in enumerate(labels):
        for other, left2, top2, right2, bottom2 in labels[index + 1 :]:
            across, down = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
            if across > 0 and down > most_down:
                overlaps.append(f"{name!r} covers {other!r} by {across:.0f} x {down:.0f}")
    return overlaps
