"""Files and bytes for a page or a script of ours, over HTTP on the loopback address, and what it sends back.

Every answer isolates its page from other origins (COOP and COEP): only then may WebAssembly have threads, and only then
does `performance.now` tell times apart by 5 microseconds and not by 100.
"""

from __future__ import annotations

import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

_SCRIPT = "text/javascript"
_TYPES = {".html": "text/html", ".js": _SCRIPT, ".mjs": _SCRIPT, ".wasm": "application/wasm"}
_ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Loopback:
    """A server on a free port; a context manager. Its paths begin with a secret, so that no other page can ask."""

    def __init__(self) -> None:
        self._given: dict[str, Path | bytes] = {}
        self._sent: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.root = f"/{secrets.token_urlsafe(16)}/"
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}{self.root}"

    def put(self, path: str, content: Path | bytes) -> None:
        """Serve a file or bytes under ``path`` from now on."""
        self._given[path] = content

    def get(self, path: str) -> bytes | None:
        """Return the content that is served at ``path``."""
        content = self._given.get(path)
        return content.read_bytes() if isinstance(content, Path) else content

    def keep(self, path: str, content: bytes) -> None:
        """Keep what was sent there."""
        self._sent[path] = content

    def taken(self, path: str) -> bytes:
        """What was sent to ``path`` last, which is then forgotten."""
        return self._sent.pop(path)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _handler(served: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path)
            content = served.get(path[len(served.root) :]) if path.startswith(served.root) else None
            self._answer(404 if content is None else 200, content or b"")

        def do_POST(self) -> None:
            if not self.path.startswith(served.root):
                self.close_connection = True
                self._answer(404, b"")
                return
            served.keep(self.path[len(served.root) :], self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self._answer(200, b"")

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", _TYPES.get(Path(self.path).suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(content)))
            for name, value in _ISOLATED.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    return Handler
