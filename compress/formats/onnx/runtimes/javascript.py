"""Process that runs a model in JavaScript: a page of headless Chromium, or Node. Both load `page/session.mjs`."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import psutil

from compress.formats.onnx.runtimes.chromium import NAMES, open_page
from compress.formats.onnx.runtimes.loopback import Loopback
from compress.utils.errors import InputError, StageError

_FOLDER = files("compress.formats.onnx.runtimes") / "page"
_SECONDS = 600.0
_TAIL_CHARACTERS = 2000
_GRAPHICS = ("dri/renderD*", "nvidia0", "dxg")


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
    if find_chromium() is None:
        return "there is no Chromium on PATH (Debian: apt-get install chromium)"
    return None


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
    return (
        None
        if has_adapter
        else "Chromium gives its pages no WebGPU adapter of a graphics card; its driver may be missing"
    )


def lacking_node() -> str | None:
    """Return why Node is missing, or ``None``."""
    return None if shutil.which("node") else "there is no node on PATH (Debian: apt-get install nodejs)"


def find_chromium() -> str | None:
    """Return the path of the browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


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
