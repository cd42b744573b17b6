"""A headless Chromium that obeys over two pipes, by the DevTools protocol: no port is opened, no driver installed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.utils.errors import InputError, StageError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = (
    *("--headless", "--no-first-run", "--disable-sync", "--disable-default-apps"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--no-pings"),
    "--disable-features=OptimizationHints,MediaRouter,DialMediaRouteProvider",
)
_NO_GPU, _WEBGPU = ("--disable-gpu",), ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
_CHUNK = 1 << 20
_SECONDS = 60.0
_REMOVALS = 100


class Page:
    """Tab of the process ``browser``, with the addresses that it requested and the errors of its scripts."""

    def __init__(self, browser: int, to_browser: int, from_browser: int) -> None:
        self.browser = browser
        self._to, self._from = to_browser, from_browser
        self._session: str | None = None
        self._last = 0
        self._pending = b""
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the DevTools protocol; raise `StageError` if it is refused or takes more than a minute."""
        return self._ask(method, parameters, _SECONDS)

    def _ask(self, method: str, parameters: dict[str, Any], seconds: float) -> dict[str, Any]:
        self._last += 1
        message_id = self._last
        message: dict[str, Any] = {"id": message_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            content = json.dumps(message).encode() + b"\0"
            while content:
                content = content[os.write(self._to, content) :]
        except BrokenPipeError:
            raise _gone() from None
        for answer in self._messages(time.monotonic() + seconds):
            if answer.get("id") == message_id:
                if "error" in answer:
                    raise StageError(f"Chromium refuses {method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result
        raise StageError(f"Chromium does not answer to {method} within {seconds:g} s.")

    def attach(self) -> None:
        """Open the tab and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Inspector"):
            self.call(f"{domain}.enable")

    def evaluate(self, expression: str, seconds: float = _SECONDS) -> Any:
        """Return the value of a JavaScript expression, awaiting a promise; raise `StageError` if it throws."""
        parameters = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        result = self._ask("Runtime.evaluate", parameters, seconds)
        if "exceptionDetails" in result:
            raise StageError(f"The page fails: {_words(result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = _SECONDS) -> Any:
        """Return the first true value of ``expression``; raise `StageError` if there is none in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.evaluate(expression)
            if value:
                return value
            time.sleep(0.02)
        raise StageError(
            f"The page does not come to {expression} within {seconds:g} s.", where="; ".join(self.errors) or None
        )

    def _messages(self, deadline: float) -> Iterator[dict[str, Any]]:
        while (remaining := deadline - time.monotonic()) > 0:
            whole, separator, remainder = self._pending.partition(b"\0")
            if separator:
                self._pending = remainder
                message = json.loads(whole)
                method, parameters = message.get("method"), message.get("params", {})
                if method == "Network.requestWillBeSent":
                    self.requests.append(parameters["request"]["url"])
                if method == "Inspector.targetCrashed":
                    raise StageError("The page crashed in Chromium.", hint="it may need more memory than it can have")
                if method == "Runtime.exceptionThrown":
                    self.errors.append(_words(parameters["exceptionDetails"]))
                yield message
                continue
            if select.select([self._from], [], [], remaining)[0]:
                received = os.read(self._from, _CHUNK)
                if not received:
                    raise _gone()
                self._pending += received


@contextmanager
def open_page(*options: str, program: str | None = None, webgpu: bool = False) -> Iterator[Page]:
    """Open a blank page in a fresh profile; ``webgpu`` lets it use the graphics card.

    Raises:
        InputError: There is no Chromium.
    """
    executable = program or find_chromium()
    if executable is None:
        raise InputError("There is no Chromium on PATH.", hint="install one (Debian: apt-get install chromium)")
    # Chromium refuses its sandbox to root.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        gpu = _WEBGPU if webgpu else _NO_GPU
        command = [executable, *_QUIET, *gpu, *sandbox, f"--user-data-dir={home}", "--remote-debugging-pipe", *options]
        theirs_in, to_browser = os.pipe()
        from_browser, theirs_out = os.pipe()
        browser = _start(command, theirs_in, theirs_out, Path(home))
        # A process ends the browser and removes its profile once this process is gone: the input of `cat` ends then,
        # even if this process is killed.
        script = 'cat; kill -9 "$0"; while [ -e "$1" ]; do sleep 1; rm -rf -- "$1"; done'
        shell, pipe, nothing = ["/bin/sh", "-c", script, str(browser), home], subprocess.PIPE, subprocess.DEVNULL
        reaper = subprocess.Popen(shell, stdin=pipe, stdout=nothing, stderr=nothing, start_new_session=True)
        try:
            page = Page(browser, to_browser, from_browser)
            page.attach()
            yield page
        finally:
            # While the browser is not waited for, nobody else has its number, which the reaper would kill.
            reaper.kill()
            reaper.communicate()
            os.kill(browser, signal.SIGKILL)
            os.waitpid(browser, 0)
            os.close(to_browser)
            os.close(from_browser)
            # The browser's children outlive it by a moment, in which they still write into the profile.
            for _ in range(_REMOVALS):
                shutil.rmtree(home, ignore_errors=True)
                if not Path(home).exists():
                    break
                time.sleep(0.05)


def find_chromium() -> str | None:
    """Return the path of the browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def _start(command: list[str], read: int, write: int, home: Path) -> int:
    """Start Chromium and return its process id; it reads commands from descriptor 3 and writes answers to 4."""
    descriptors = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in (read, write)]
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT)
    file_actions = [
        (os.POSIX_SPAWN_DUP2, source, target)
        for source, target in zip((log, log, *descriptors), (1, 2, 3, 4), strict=True)
    ]
    try:
        # What it puts beside its profile goes with it.
        environment = {**os.environ, "TMPDIR": str(home)}
        return os.posix_spawn(command[0], command, environment, file_actions=file_actions, setsid=True)
    finally:
        for descriptor in (read, write, log, *descriptors):
            os.close(descriptor)


def _gone() -> StageError:
    return StageError(
        "Chromium has gone.", hint="run it by hand to see why: chromium --headless --dump-dom about:blank"
    )


def _words(details: dict[str, Any]) -> str:
    thrown = details.get("exception", {})
    return str(thrown.get("description") or thrown.get("value") or details.get("text"))
