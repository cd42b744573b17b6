"""Program that answers on a device, run by the device's own Python; it imports the standard library only.

This machine sends this file with every request (`connection.Connection.request`) and runs `answer`. Below the cache lie

    blobs/SHA256        files, each named by the digest of its bytes; blobs/SHA256.part is still arriving
    code/SHA256/        this package as it was sent
    venvs/KEY/          a complete environment; it gets this name once the harness was imported in it
    sessions/ID/        a session's files, its order, its progress and its result; removed at the end
    lock                held by the process of the one session that may run; its text names the session
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOCK, BLOBS, CODE, VENVS, SESSIONS = "lock", "blobs", "code", "venvs", "sessions"
ORDER, PROGRESS, RESULT, ALIVE, LOG = "order.json", "progress.jsonl", "result.json", "alive", "log"
KEEP_SECONDS = 30 * 86400
"""Age of unused files that are removed when a session begins."""
WAIT_SECONDS = 300.0
"""Silence of the requesting machine after which a session ends itself."""
POLL_SECONDS = 0.5
TAIL_CHARACTERS = 2000
_TRIES = 20
_HEARTBEAT_SECONDS = 2.0
BYTES_AT_ONCE = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_SESSION = re.compile(r"[0-9a-f]{32}\Z")
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from compress.plugins.devices.bootstrap import main; main(*sys.argv[2:])"
)

Message = dict[str, Any]


class RefusedError(Exception):
    """Refusal that the requesting machine reports: ``what`` happened, and what was ``expected``."""

    def __init__(self, what: str, expected: str | None = None) -> None:
        super().__init__(what)
        self.told = {"what": what, "expected": expected}


def probe(message: Message) -> Message:
    """Return what this machine is, its free space, who measures on it, and which of `blobs` it has (sizes in bytes)."""
    cache = _cache(message)
    blobs = [checked_digest(blob) for blob in message["blobs"]]
    present = [blob for blob in blobs if (cache / BLOBS / blob).is_file()]
    for blob in present:
        os.utime(cache / BLOBS / blob)
    existing = next(place for place in (cache, *cache.parents) if place.exists())
    return {
        "cache": str(cache),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "free_bytes": shutil.disk_usage(existing).free,
        "present": present,
        "parts": {blob: _part(cache, blob).stat().st_size for blob in blobs if _part(cache, blob).is_file()},
        "has_environment": (cache / VENVS / environment_key(message["requirements"])).is_dir(),
        "holder": _holder(cache),
    }


def begin(message: Message) -> Message:
    """Start the session `session` for `who` unless it was started before.

    If `holder` in the reply is not null, another session has the lock.
    """
    cache, folder = _cache(message), _session(message)
    for name in (BLOBS, CODE, VENVS, SESSIONS):
        (cache / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(cache / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    for tries_left in reversed(range(_TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if _own_holder(message):
                return {"holder": None}
            if not tries_left:
                return {"holder": _holder(cache) or {"who": "somebody", "since": "just now", "session": ""}}
            # Whoever only asked who has the lock lets go of it at once.
            time.sleep(0.05)
    _sweep(cache)
    for path, text in message["program"].items():
        (folder / "program" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "program" / path).write_text(text, encoding="utf-8")
    (folder / ALIVE).touch()
    with (folder / LOG).open("wb") as log:
        command = [sys.executable, "-I", "-c", _START, str(folder / "program"), str(cache), message["session"]]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=(lock,)
        )
    holder_text = {**{key: message[key] for key in ("who", "since", "session")}, "pid": process.pid}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder_text).encode(), 0)
    return {"holder": None}


def receive(message: Message) -> Message:
    """Write standard input into the part of `blob`, from byte `offset` to `size`, and report each step.

    A complete blob gets its name. If its bytes have another digest, it is removed, and `kept` is false.
    """
    cache, blob, offset = _cache(message), checked_digest(message["blob"]), message["offset"]
    part = _part(cache, blob)
    try:
        with part.open("r+b" if part.exists() else "w+b") as file:
            file.seek(offset)
            while block := sys.stdin.buffer.read(min(BYTES_AT_ONCE, message["size"] - offset)):
                file.write(block)
                file.flush()
                offset += len(block)
                _say({"offset": offset})
            file.seek(0)
            kept = offset == message["size"] and hashlib.file_digest(file, "sha256").hexdigest() == blob
    except OSError as error:
        expected = "a folder that may be written to, on a disk that is not full"
        raise RefusedError(f"{part}: it cannot write what is sent to it: {error.strerror}.", expected) from error
    if kept:
        part.replace(cache / BLOBS / blob)
    elif offset == message["size"]:
        part.unlink()
    return {"kept": kept}


def order(message: Message) -> Message:
    """Give a session its order."""
    folder = _running(message)
    (folder / ALIVE).touch()
    write_json(folder / ORDER, message["order"])
    return {}


def touch(message: Message) -> Message:
    """Record that the requesting machine is still there."""
    (_running(message) / ALIVE).touch()
    return {}


def follow(message: Message) -> Message:
    """Print the session's lines from byte `offset` on as they appear, and an empty one after 2 s without any.

    The answer, once the session's process has ended, is `{"ended": true, "result": ..., "log": ...}`.
    """
    folder, offset, last_output, running = _running(message), message["offset"], time.monotonic(), True
    while running:
        running = _own_holder(message) is not None
        (folder / ALIVE).touch()
        for end_of_line, line in _lines(folder / PROGRESS, offset):
            offset = end_of_line
            _say({"offset": offset, **line})
            last_output = time.monotonic()
        if running and time.monotonic() - last_output > _HEARTBEAT_SECONDS:
            _say({"offset": offset})
            last_output = time.monotonic()
        time.sleep(POLL_SECONDS if running else 0)
    result, log = folder / RESULT, (folder / LOG).read_text(encoding="utf-8", errors="replace")
    content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    return {"ended": True, "result": content, "log": log[-TAIL_CHARACTERS:].strip()}


def end(message: Message) -> Message:
    """Stop the session if it still runs, and remove its files."""
    if holder := _own_holder(message):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder["pid"], signal.SIGKILL)
        for _ in range(_TRIES):
            if _own_holder(message) is None:
                break
            time.sleep(0.1)
    shutil.rmtree(_session(message), ignore_errors=True)
    return {}


def clear(message: Message) -> Message:
    """Remove the cache unless a session runs; `bytes` in the reply were freed."""
    cache = _cache(message)
    holder = _holder(cache)
    if holder or not cache.is_dir():
        return {"holder": holder, "bytes": 0}
    if not {entry.name for entry in cache.iterdir()} <= {LOCK, BLOBS, CODE, VENVS, SESSIONS}:
        raise RefusedError(f"{cache} holds other files than a cache of this kind, so it is not removed.")
    size = sum(path.lstat().st_size for path in cache.rglob("*"))
    shutil.rmtree(cache)
    return {"holder": None, "bytes": size}


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def environment_key(requirements: list[str]) -> str:
    """Return the name of the environment with these requirements for this interpreter."""
    text = json.dumps([sorted(requirements), sys.version, platform.machine(), sys.executable])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def checked_digest(text: str) -> str:
    """Return a SHA-256 digest in hexadecimal. Raises `RefusedError` for any other text."""
    if not _DIGEST.match(text):
        raise RefusedError(f"{text!r} is no SHA-256 digest.")
    return text


def _sweep(cache: Path) -> None:
    """Remove files of sessions that ended badly, and everything unused for a month. The caller holds the lock."""
    now = time.time()
    for entry in (cache / SESSIONS).iterdir():
        alive = entry / ALIVE
        if not alive.exists() or now - alive.stat().st_mtime > WAIT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
    for entry in [*(cache / BLOBS).iterdir(), *(cache / CODE).iterdir(), *(cache / VENVS).iterdir()]:
        # An environment or code that was being made when its session died is never completed.
        if entry.name.startswith("new-") or now - entry.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _holder(cache: Path) -> Message | None:
    """Return who holds the lock, or None if nobody does or its holder has not written its name yet."""
    try:
        lock = os.open(cache / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(ValueError):
            holder: Message = json.loads(os.pread(lock, 1 << 16, 0))
            return holder
    finally:
        os.close(lock)
    return None


def _own_holder(message: Message) -> Message | None:
    """Return the holder of the lock if it is the message's own session."""
    holder = _holder(_cache(message))
    return holder if holder and holder["session"] == message["session"] else None


def _lines(path: Path, offset: int) -> list[tuple[int, Message]]:
    """Return the complete lines from byte ``offset`` on, each with the offset of its end."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    lines = []
    for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        lines.append((offset, json.loads(line)))
    return lines


def _cache(message: Message) -> Path:
    """Return the cache's folder, which counts from the home folder."""
    return Path.home() / str(message["cache"])


def _part(cache: Path, blob: str) -> Path:
    """Return the file of a blob that is still arriving."""
    return cache / BLOBS / f"{blob}.part"


def _session(message: Message) -> Path:
    """Return the folder of a session. Raises `RefusedError` for a malformed name."""
    if not _SESSION.match(message["session"]):
        raise RefusedError(f"{message['session']!r} is no session.")
    return _cache(message) / SESSIONS / str(message["session"])


def _running(message: Message) -> Path:
    """Return the folder of a session that was begun and has not ended."""
    folder = _session(message)
    if not folder.is_dir():
        raise RefusedError(f"the session is gone; nothing had been heard from here for {WAIT_SECONDS:.0f} s")
    return folder


def _say(reply: Message) -> None:
    """Print a reply as one line of JSON."""
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def answer(message: Message) -> None:
    """Perform the action that a message names; the last line on standard output is the answer."""
    actions = {action.__name__: action for action in (probe, begin, receive, order, touch, follow, end, clear)}
    try:
        reply = actions[message["do"]](message)
    except (RefusedError, OSError) as error:
        reply = {"refusal": error.told if isinstance(error, RefusedError) else {"what": str(error), "expected": None}}
    _say(reply)
