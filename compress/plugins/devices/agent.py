"""What answers on a device, by its own Python, before there is anything else of ours: the standard library only.

The near end sends this file with every request (`connection.Connection.ask`), and runs `answer`. Below the cache lie

    blobs/SHA256        files, each under the digest of its bytes; blobs/SHA256.part is one that is still arriving
    code/SHA256/        this package as it was sent
    venvs/KEY/          an environment that is whole: it gets this name when the harness was imported in it
    sessions/ID/        a session's files, its order, its progress and its result; removed at the end
    lock                held by the process of the one session that may run; its text says whose
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
"""What nobody has used for so long is removed when a session begins."""
WAIT_SECONDS = 300.0
"""A session whose near end hasn't been heard of for so long ends by itself."""
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
    """What the near end shall say: `what` happened, what was `expected`."""

    def __init__(self, what: str, expected: str | None = None) -> None:
        super().__init__(what)
        self.told = {"what": what, "expected": expected}


def probe(message: Message) -> Message:
    """What this machine is, what it has room for, who measures on it, and which of `blobs` it has (sizes in bytes)."""
    cache = _cache(message)
    blobs = [checked_digest(blob) for blob in message["blobs"]]
    present = [blob for blob in blobs if (cache / BLOBS / blob).is_file()]
    for blob in present:
        os.utime(cache / BLOBS / blob)
    around = next(place for place in (cache, *cache.parents) if place.exists())
    return {
        "cache": str(cache),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "free_bytes": shutil.disk_usage(around).free,
        "present": present,
        "parts": {blob: _part(cache, blob).stat().st_size for blob in blobs if _part(cache, blob).is_file()},
        "has_environment": (cache / VENVS / environment_key(message["requirements"])).is_dir(),
        "holder": _holder(cache),
    }


def begin(message: Message) -> Message:
    """Start the session `session` for `who`, or find that it was started; `holder` is whoever has the lock instead."""
    cache, folder = _cache(message), _session(message)
    for place in (BLOBS, CODE, VENVS, SESSIONS):
        (cache / place).mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(cache / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            holder = _holder(cache)
            if holder and holder["session"] == message["session"]:
                return {"holder": None}
            if not left:
                return {"holder": holder or {"who": "somebody", "since": "just now", "session": ""}}
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
    told = {**{key: message[key] for key in ("who", "since", "session")}, "pid": process.pid}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(told).encode(), 0)
    return {"holder": None}


def receive(message: Message) -> Message:
    """Write what follows on standard input into the part of `blob`, from byte `offset` to `size`, saying how far it is.

    The blob that is whole gets its name; one whose bytes have another digest is removed, and is not `kept`.
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
    """Tell a session what to do."""
    folder = _running(message)
    (folder / ALIVE).touch()
    write(folder / ORDER, message["order"])
    return {}


def touch(message: Message) -> Message:
    """Say that the near end is there."""
    (_running(message) / ALIVE).touch()
    return {}


def follow(message: Message) -> Message:
    """Print the session's lines from byte `offset` on as they come, and an empty one where none comes for 2 s.

    The answer, once the session's process is gone, is `{"ended": true, "result": ..., "log": ...}`.
    """
    cache, folder = _cache(message), _running(message)
    offset, said = message["offset"], time.monotonic()
    running = True
    while running:
        running = (_holder(cache) or {}).get("session") == message["session"]
        (folder / ALIVE).touch()
        for end_of_line, line in _lines(folder / PROGRESS, offset):
            offset = end_of_line
            _say({"offset": offset, **line})
            said = time.monotonic()
        if running and time.monotonic() - said > _HEARTBEAT_SECONDS:
            _say({"offset": offset})
            said = time.monotonic()
        time.sleep(POLL_SECONDS if running else 0)
    result, log = folder / RESULT, (folder / LOG).read_text(encoding="utf-8", errors="replace")
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    return {"ended": True, "result": found, "log": log[-TAIL_CHARACTERS:].strip()}


def end(message: Message) -> Message:
    """Stop the session if it still runs, and remove its files."""
    cache = _cache(message)
    holder = _holder(cache)
    if holder and holder["session"] == message["session"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder["pid"], signal.SIGKILL)
        for _ in range(_TRIES):
            if (_holder(cache) or {}).get("session") != message["session"]:
                break
            time.sleep(0.1)
    shutil.rmtree(_session(message), ignore_errors=True)
    return {}


def clear(message: Message) -> Message:
    """Remove the cache, unless somebody measures; `bytes` were freed."""
    cache = _cache(message)
    holder = _holder(cache)
    if holder or not cache.is_dir():
        return {"holder": holder, "bytes": 0}
    if not {entry.name for entry in cache.iterdir()} <= {LOCK, BLOBS, CODE, VENVS, SESSIONS}:
        raise RefusedError(f"{cache} holds other files than a cache of this kind, so it is not removed.")
    size = sum(path.lstat().st_size for path in cache.rglob("*"))
    shutil.rmtree(cache)
    return {"holder": None, "bytes": size}


def write(path: Path, content: Any) -> None:
    """Put a JSON file in its place whole."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)


def environment_key(requirements: list[str]) -> str:
    """Name of the environment with these requirements, made by this interpreter."""
    told = json.dumps([sorted(requirements), sys.version, platform.machine(), sys.executable])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def checked_digest(text: str) -> str:
    """A SHA-256 digest in hexadecimal, and nothing else."""
    if not _DIGEST.match(text):
        raise RefusedError(f"{text!r} is no SHA-256 digest.")
    return text


def _sweep(cache: Path) -> None:
    """Remove what is left of sessions that ended badly, and what nobody has used for a month. The lock is held."""
    now = time.time()
    for place in (cache / SESSIONS).iterdir():
        alive = place / ALIVE
        if not alive.exists() or now - alive.stat().st_mtime > WAIT_SECONDS:
            shutil.rmtree(place, ignore_errors=True)
    for place in [*(cache / BLOBS).iterdir(), *(cache / CODE).iterdir(), *(cache / VENVS).iterdir()]:
        if place.name.startswith("new-") or now - place.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def _holder(cache: Path) -> Message | None:
    """Who holds the lock; `None` where nobody does, or who does hasn't said yet."""
    try:
        lock = os.open(cache / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(ValueError):
            told: Message = json.loads(os.pread(lock, 1 << 16, 0))
            return told
    finally:
        os.close(lock)
    return None


def _lines(path: Path, offset: int) -> list[tuple[int, Message]]:
    """The whole lines from byte ``offset`` on, each with the offset behind it."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    found = []
    for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        found.append((offset, json.loads(line)))
    return found


def _cache(message: Message) -> Path:
    return Path.home() / str(message["cache"])


def _part(cache: Path, blob: str) -> Path:
    return cache / BLOBS / f"{blob}.part"


def _session(message: Message) -> Path:
    if not _SESSION.match(message["session"]):
        raise RefusedError(f"{message['session']!r} is no session.")
    return _cache(message) / SESSIONS / str(message["session"])


def _running(message: Message) -> Path:
    """The folder of a session that was begun and not ended."""
    folder = _session(message)
    if not folder.is_dir():
        raise RefusedError(f"the session is gone; nothing had been heard from here for {WAIT_SECONDS:.0f} s")
    return folder


def _say(reply: Message) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def answer(message: Message) -> None:
    """Do what is asked; the last line is the answer."""
    actions = {each.__name__: each for each in (probe, begin, receive, order, touch, follow, end, clear)}
    try:
        reply = actions[message["do"]](message)
    except RefusedError as refusal:
        reply = {"refusal": refusal.told}
    except OSError as error:
        reply = {"refusal": {"what": str(error), "expected": None}}
    _say(reply)
