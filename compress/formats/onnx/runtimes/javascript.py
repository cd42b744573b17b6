"""A model's process where JavaScript runs it: a page of headless Chromium, or Node. Both load `page/session.mjs`."""

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

from compress.runtimes.chromium import NAMES, open_page
from compress.runtimes.loopback import Loopback
from compress.utils.errors import InputError, StageError

_FOLDER = files("compress.formats.onnx.runtimes") / "page"
_SECONDS = 600.0
_TAIL_CHARACTERS = 2000
_GRAPHICS = ("dri/renderD*", "nvidia0", "dxg")


class FailedError(Exception):
    """What the JavaScript threw, in its own words."""


class Chromium:
    """A page in a browser of its own."""

    most_threads = 1024
    """As many as one likes."""

    def __init__(self, server: Loopback, webgpu: bool = False) -> None:
        self._server = server
        for name in ("page.html", "session.mjs"):
            server.put(name, (_FOLDER / name).read_bytes())
        with ExitStack() as stack:
            self._page = stack.enter_context(open_page(webgpu=webgpu))
            self._page.call("Page.navigate", url=f"{server.address}page.html")
            self._page.wait_for("globalThis.session !== undefined")
            self._stack = stack.pop_all()

    def call(self, name: str, given: dict[str, Any]) -> Any:
        """What the function of that name in `page/session.mjs` gives.

        Raises `FailedError` where it throws, `StageError` where no answer comes.
        """
        made = f"session.{name}({json.dumps(given)})"
        told = "found => ({found: found ?? null}), error => ({failed: String(error?.message ?? error)})"
        return _found(self._page.evaluate(f"{made}.then({told})", _SECONDS))

    def module(self, path: Path) -> str:
        """By what name a module of this machine is imported there: served, since a page has no other way to it."""
        self._server.put(path.name, path)
        return f"./{path.name}"

    @functools.cached_property
    def process(self) -> psutil.Process:
        """The one with the model: the largest renderer once WebAssembly runs, since spare ones wait for other pages."""
        return largest_renderer(psutil.Process(self._page.browser))

    def close(self) -> None:
        """End it."""
        self._stack.close()


class NodeProcess:
    """The same WebAssembly without a browser. It ends by itself when this process does."""

    most_threads = 1
    """The build for pages has its threads in Web Workers, which Node has not."""

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
        if not line:
            self._stderr.seek(0)
            tail = self._stderr.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()
            raise StageError(f"Node has ended by itself. Its last words:\n{tail}", where=f"its call of {name}")
        return _found(json.loads(line))

    def module(self, path: Path) -> str:
        """See `Chromium.module`: a file, since Node imports nothing over HTTP."""
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


def _found(told: dict[str, Any]) -> Any:
    if "failed" in told:
        raise FailedError(told["failed"])
    return told["found"]


def lacking_chromium() -> str | None:
    """Why no page can be opened here, or ``None``."""
    if find_chromium() is None:
        return "there is no Chromium on PATH (Debian: apt-get install chromium)"
    return None


@functools.cache
def lacking_webgpu() -> str | None:
    """Why a page has no WebGPU here, or ``None``; a device is looked for before a browser is started to ask it."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in _GRAPHICS):
        return "there is no graphics device (/dev/dri), so that Chromium has no WebGPU adapter"
    with Loopback() as server, open_page(webgpu=True) as page:
        server.put("page.html", b"")
        page.call("Page.navigate", url=f"{server.address}page.html")  # only a page of a secure origin is given one
        page.wait_for("document.readyState === 'complete'")
        found = page.evaluate("navigator.gpu?.requestAdapter().then((it) => it && !it.info.isFallbackAdapter)")
    return None if found else "Chromium gives its pages no WebGPU adapter of a graphics card; its driver may be missing"


def lacking_node() -> str | None:
    """Why there is no Node here, or ``None``."""
    return None if shutil.which("node") else "there is no node on PATH (Debian: apt-get install nodejs)"


def find_chromium() -> str | None:
    """The browser's program."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@functools.cache
def version_of(program: str) -> str:
    """What a program says of its version."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def largest_renderer(browser: psutil.Process) -> psutil.Process:
    """The process of a page that takes the most memory. Those that end while they are looked at are passed over.

    Raises `StageError` where the browser has none.
    """
    resident_bytes = {}
    for child in browser.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "--type=renderer" in child.cmdline():
                resident_bytes[child] = child.memory_info().rss
    if not resident_bytes:
        raise StageError("Chromium has no process of a page.", where="its page with the model")
    return max(resident_bytes, key=resident_bytes.__getitem__)


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process has held so far."""
    told = Path(f"/proc/{process.pid}/status").read_text() if process.is_running() else ""
    for line in told.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise StageError("The process with the model has ended by itself.", where=f"process {process.pid}")


def processor_seconds(process: psutil.Process) -> float:
    """What all threads that a process has now took of the processor."""
    nanoseconds = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        try:
            nanoseconds += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # a thread that has just ended
            continue
    return nanoseconds / 1e9
