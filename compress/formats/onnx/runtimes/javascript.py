"""Process that runs a model in JavaScript (headless Chromium or Node), and the pinned packages that it loads.

Both load `page/session.mjs`. `PACKAGES` has onnxruntime-web's build for processors, which is half as large as the
build with WebGPU. `CLIENT` contains the latter with transformers.js.
"""

from __future__ import annotations

import functools
import json
import secrets
import shutil
import subprocess
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import psutil

from compress.data.samples.sample import Package, Sample
from compress.formats.onnx.runtimes.chromium import find_chromium, open_page
from compress.formats.target_profile import WEB_VERSION
from compress.utils.errors import InputError, StageError

_TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


_FOLDER = files("compress.formats.onnx.runtimes") / "page"
_SECONDS = 600.0
_TAIL_CHARACTERS = 2000
_GRAPHICS = ("dri/renderD*", "nvidia0", "dxg")

SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
WEBGPU_SCRIPT, WEBGPU_WASM = "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"
TOKENIZERS = "tokenizers.min.mjs"
LIBRARY, WASM_SCRIPT = "transformers.min.js", "ort-wasm-simd-threaded.mjs"
_LICENCE = "MIT (onnxruntime-web, (c) Microsoft Corporation)"


class FailedError(Exception):
    """Error that JavaScript code threw, with its message."""


class Chromium:
    """A page in its own browser process."""

    most_threads = 1024
    """Upper limit of threads, in practice none."""

    def __init__(self, server: Loopback, webgpu: bool = False) -> None:
        self._server = server
        for name in ("page.html", "session.mjs"):
            server.put(name, (_FOLDER / name).read_bytes())
        # The browser is closed if the page does not load.
        with ExitStack() as stack:
            self._page = stack.enter_context(open_page(webgpu=webgpu))
            self._page.call("Page.navigate", url=f"{server.address}page.html")
            self._page.wait_for("globalThis.session !== undefined")
            self._stack = stack.pop_all()

    def call(self, name: str, given: dict[str, Any]) -> Any:
        """Return the result of the function of that name in `page/session.mjs`.

        Raises `FailedError` if it throws, `StageError` if it does not answer.
        """
        expression = f"session.{name}({json.dumps(given)})"
        handlers = "found => ({found: found ?? null}), error => ({failed: String(error?.message ?? error)})"
        return _found(self._page.evaluate(f"{expression}.then({handlers})", _SECONDS))

    def module(self, path: Path) -> str:
        """Return the name by which the page imports a local module, which is served because a page reads no files."""
        self._server.put(path.name, path)
        return f"./{path.name}"

    @functools.cached_property
    def process(self) -> psutil.Process:
        """Process with the model: the largest renderer once WebAssembly runs; spare ones wait for other pages."""
        return largest_renderer(psutil.Process(self._page.browser))

    def close(self) -> None:
        """End the browser."""
        self._stack.close()


class NodeProcess:
    """WebAssembly in Node, without a browser. The process ends when this process ends."""

    most_threads = 1
    """Upper limit of threads. The build for pages runs them in Web Workers, which Node lacks."""

    def __init__(self, server: Loopback, webgpu: bool = False) -> None:
        program = shutil.which("node")
        if program is None:
            raise InputError("There is no node on PATH.", hint="install Node.js (Debian: apt-get install nodejs)")
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            [program, str(_FOLDER / "node.mjs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )

    def call(self, name: str, given: dict[str, Any]) -> Any:
        """See `Chromium.call`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"name": name, "given": given}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        # An empty line means that the process has ended.
        if not line:
            self._stderr.seek(0)
            tail = self._stderr.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()
            raise StageError(f"Node has ended unexpectedly. Its last output:\n{tail}", where=f"its call of {name}")
        return _found(json.loads(line))

    def module(self, path: Path) -> str:
        """See `Chromium.module`; it is a file, because Node imports nothing over HTTP."""
        return path.as_uri()

    @property
    def process(self) -> psutil.Process:
        """See `Chromium.process`."""
        return psutil.Process(self._process.pid)

    def close(self) -> None:
        """See `Chromium.close`."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()


Host = Chromium | NodeProcess


def _found(answer: dict[str, Any]) -> Any:
    """Return the result of a call. Raises `FailedError` if it failed."""
    if "failed" in answer:
        raise FailedError(answer["failed"])
    return answer["found"]


def lacking_chromium() -> str | None:
    """Return why no page can be opened, or ``None``."""
    return None if find_chromium() else "there is no Chromium on PATH (Debian: apt-get install chromium)"


@functools.cache
def lacking_webgpu() -> str | None:
    """Return why a page has no WebGPU, or ``None``; a graphics device is looked for before a browser is started."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in _GRAPHICS):
        return "there is no graphics device (/dev/dri), so that Chromium has no WebGPU adapter"
    with Loopback() as server, open_page(webgpu=True) as page:
        server.put("page.html", b"")
        page.call("Page.navigate", url=f"{server.address}page.html")  # only a page of a secure origin is given one
        page.wait_for("document.readyState === 'complete'")
        has_adapter = page.evaluate("navigator.gpu?.requestAdapter().then((it) => it && !it.info.isFallbackAdapter)")
    problem = "Chromium gives its pages no WebGPU adapter of a graphics card; its driver may be missing"
    return None if has_adapter else problem


def lacking_node() -> str | None:
    """Return why Node is missing, or ``None``."""
    return None if shutil.which("node") else "there is no node on PATH (Debian: apt-get install nodejs)"


@functools.cache
def version_of(program: str) -> str:
    """Return the version that a program prints."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def largest_renderer(browser: psutil.Process) -> psutil.Process:
    """Return the page's process with the most memory. Processes that end meanwhile are skipped.

    Raises `StageError` if the browser has none.
    """
    resident_bytes = {}
    for child in browser.children(recursive=True):
        # Spare renderers may end at any time.
        with suppress(psutil.NoSuchProcess):
            if "--type=renderer" in child.cmdline():
                resident_bytes[child] = child.memory_info().rss
    if not resident_bytes:
        raise StageError("Chromium has no renderer process.", where="its page with the model")
    return max(resident_bytes, key=resident_bytes.__getitem__)


def peak_bytes(process: psutil.Process) -> int:
    """Return the highest memory use of a process so far."""
    status = Path(f"/proc/{process.pid}/status").read_text() if process.is_running() else ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise StageError("The process with the model has ended unexpectedly.", where=f"process {process.pid}")


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time of all current threads of a process."""
    nanoseconds = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        try:
            nanoseconds += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # a thread that has just ended
            continue
    return nanoseconds / 1e9


_RUNTIME = Package(
    manager="npm",
    distribution="onnxruntime-web",
    version=WEB_VERSION,
    filename=f"onnxruntime-web-{WEB_VERSION}.tgz",
    sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
    download_bytes=33106585,
    licence_member="package/package.json",  # the package has no other word on it
    folder="package/dist",
    members=(SCRIPT, WASM),
)
_DEVELOPMENT_VERSION = "1.31.0-dev.20260914-8d85527a0"
"""Version of onnxruntime-web that transformers.js is built with."""
WEBGPU_PACKAGES = Sample(
    name="onnxruntime-web-webgpu",
    kind="runtime",
    description="ONNX Runtime for web pages, with WebGPU",
    licence=_LICENCE,
    packages=(replace(_RUNTIME, members=(WEBGPU_SCRIPT, WEBGPU_WASM)),),
)
PACKAGES = Sample(
    name="onnxruntime-web",
    kind="runtime",
    description="ONNX Runtime for web pages, and the tokenizers of transformers.js",
    licence=f"{_LICENCE}; Apache-2.0 (@huggingface/tokenizers)",
    packages=(
        _RUNTIME,
        replace(
            _RUNTIME,
            distribution="@huggingface/tokenizers",
            version="0.2.0",
            filename="huggingface-tokenizers-0.2.0.tgz",
            sha256="2800014c83b8186b2e4210c20672f1fb65a12cef85d7e95e0f2003e022611b4a",
            download_bytes=87011,
            licence_member="package/LICENSE",
            members=(TOKENIZERS,),
        ),
    ),
)
CLIENT = Sample(
    name="transformers-js",
    kind="runtime",
    description="transformers.js for web pages, with ONNX Runtime as WebAssembly",
    licence=f"Apache-2.0 (transformers.js); {_LICENCE}",
    packages=(
        replace(
            _RUNTIME,
            distribution="@huggingface/transformers",
            version="4.3.1",
            filename="huggingface-transformers-4.3.1.tgz",
            sha256="0325441d6bd7bc7697fccb32ee6e5febc7f89691e42402d071adc678237b8015",
            download_bytes=2268123,
            licence_member="package/LICENSE",
            members=(LIBRARY,),
        ),
        replace(
            _RUNTIME,
            version=_DEVELOPMENT_VERSION,
            filename=f"onnxruntime-web-{_DEVELOPMENT_VERSION}.tgz",
            sha256="0de27582f3e3189dec4a2082513a0af1ea79ae7fd3039bbfe634a526e173cbe0",
            download_bytes=33185781,
            members=(WASM, WASM_SCRIPT),
        ),
    ),
)


class Loopback(AbstractContextManager["Loopback"]):
    """HTTP server on a free local port, as a context manager.

    Its paths start with a secret that other pages do not know.
    """

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
        """Store the content that was sent to ``path``."""
        self._sent[path] = content

    def taken(self, path: str) -> bytes:
        """Remove and return the content that was last sent to ``path``."""
        return self._sent.pop(path)

    def __exit__(self, *error: object) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


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
            """Discard the log message."""

    return Handler
