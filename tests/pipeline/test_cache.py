"""Tests of the stage cache: atomic writes, detection of damaged entries, and one writer per key."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compress.pipeline.cache import CONTENT, MANIFEST, Cache, Entry
from compress.utils.environment import package_versions
from compress.utils.errors import StorageError
from compress.utils.storage import cache_key

KEY = "0" * 64
OTHER = "1" * 64


def write(content: Path) -> Mapping[str, Any]:
    (content / "sub").mkdir()
    (content / "a.txt").write_bytes(b"alpha")
    (content / "sub" / "b.txt").write_bytes(b"beta")
    return {"name": "thing", "seconds": 1.5}


def store_entry(root: Path, key: str = KEY) -> Entry:
    cache = Cache(root)
    with cache.lock(key, lambda: None):
        return cache.store(key, write)


def obtain(root: Path, make: Callable[[Path], Mapping[str, Any]] = write) -> tuple[Entry, bool, list[str]]:
    messages: list[str] = []
    entry, cached = Cache(root).obtain(KEY, make, messages.append, lambda: messages.append("waits"))
    return entry, cached, messages


def partial_folders(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith("partial-")]


def test_key_does_not_depend_on_order_of_its_parts() -> None:
    expected = hashlib.sha256(b'{"a":[1,2],"b":null}').hexdigest()
    assert cache_key({"b": None, "a": [1, 2]}) == expected
    assert cache_key({"a": [2, 1], "b": None}) != expected


def test_package_versions_are_those_installed() -> None:
    import numpy

    assert package_versions(("numpy", "no-such-package")) == {"numpy": numpy.__version__, "no-such-package": "missing"}


def test_stored_entry_is_read_back_with_digests(tmp_path: Path) -> None:
    entry = store_entry(tmp_path)
    stored_entry = Cache(tmp_path).find(KEY)
    assert stored_entry == entry == Cache(tmp_path).peek(KEY)
    assert stored_entry is not None
    assert (stored_entry.folder / "sub" / "b.txt").read_bytes() == b"beta"
    assert stored_entry.record["seconds"] == 1.5
    assert stored_entry.size_bytes == len(b"alpha") + len(b"beta")
    assert stored_entry.record["files"]["a.txt"] == {"sha256": hashlib.sha256(b"alpha").hexdigest(), "bytes": 5}
    sums = (("a.txt", b"alpha"), ("sub/b.txt", b"beta"))
    listing = "".join(f"{name}\0{hashlib.sha256(content).hexdigest()}\0" for name, content in sums)
    assert stored_entry.digest == hashlib.sha256(listing.encode()).hexdigest()


def test_lookup_in_missing_cache_returns_nothing_and_writes_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "none")
    assert (cache.find(KEY), cache.peek(KEY), cache.entries(), cache.remove_partial()) == (None, None, [], 0)
    assert not (tmp_path / "none").exists()


def test_second_request_is_a_cache_hit(tmp_path: Path) -> None:
    def never(content: Path) -> Mapping[str, Any]:
        raise AssertionError("recomputed")

    first = obtain(tmp_path)
    second = obtain(tmp_path, never)
    assert (first[1], second[1]) == (False, True)
    assert first[0] == second[0]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), StorageError("full")])
def test_failed_writer_leaves_no_entry(tmp_path: Path, error: BaseException) -> None:
    def fail(content: Path) -> Mapping[str, Any]:
        write(content)
        raise error

    with pytest.raises(type(error)):
        obtain(tmp_path, fail)
    assert Cache(tmp_path).find(KEY) is None
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert obtain(tmp_path)[1] is False


def change_a_byte(folder: Path) -> None:
    (folder / CONTENT / "a.txt").write_bytes(b"alphA")


def remove_a_file(folder: Path) -> None:
    (folder / CONTENT / "sub" / "b.txt").unlink()


def add_a_file(folder: Path) -> None:
    (folder / CONTENT / "c.txt").touch()


def cut_the_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def remove_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**record, **changes}))

    return edit


UNREADABLE = "its manifest cannot be read"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_byte, "(thing): a.txt has changed"),
        (remove_a_file, "(thing): sub/b.txt is missing"),
        (add_a_file, "(thing): c.txt is not in the manifest"),
        (cut_the_manifest, UNREADABLE),
        (remove_the_manifest, UNREADABLE),
        (edit_manifest(digest="f" * 64), UNREADABLE),
        (edit_manifest(key=OTHER), UNREADABLE),
        (edit_manifest(files=["a.txt"]), UNREADABLE),
        (edit_manifest(files={}), UNREADABLE),
        (edit_manifest(name=None), UNREADABLE),
        (edit_manifest(created="yesterday"), UNREADABLE),
        (lambda folder: (folder / MANIFEST).write_text("[]"), UNREADABLE),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), UNREADABLE),
    ],
)
def test_damaged_entry_is_detected_and_rebuilt(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    whole = store_entry(tmp_path)
    damage(tmp_path / KEY)
    entry, cached, notes = obtain(tmp_path)
    assert not cached
    assert [note for note in notes if message in note and "recomputed" in note] == notes != []
    assert entry.digest == whole.digest
    assert Cache(tmp_path).find(KEY) == entry
    assert partial_folders(tmp_path) == []


def test_partial_folder_of_killed_writer_is_ignored_and_removed(tmp_path: Path) -> None:
    left = tmp_path / f"partial-{KEY}" / CONTENT
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"x" * 100)
    assert Cache(tmp_path).find(KEY) is None
    assert Cache(tmp_path).entries() == []
    entry, _, _ = obtain(tmp_path)
    assert set(entry.record["files"]) == {"a.txt", "sub/b.txt"}
    assert partial_folders(tmp_path) == []


def test_interrupted_removal_is_completed_by_remove_partial(tmp_path: Path) -> None:
    store_entry(tmp_path)
    (tmp_path / KEY).rename(tmp_path / f"partial-{KEY}.old")
    assert Cache(tmp_path).find(KEY) is None
    assert Cache(tmp_path).remove_partial() > len(b"alphabeta")
    assert list(tmp_path.iterdir()) == []


def test_entries_are_listed_oldest_first(tmp_path: Path) -> None:
    store_entry(tmp_path, OTHER)
    store_entry(tmp_path, KEY)
    (tmp_path / "models").mkdir()
    assert [entry.key for entry in Cache(tmp_path).entries()] == [OTHER, KEY]


def test_remove_deletes_one_entry_and_returns_its_bytes(tmp_path: Path) -> None:
    store_entry(tmp_path, OTHER)
    store_entry(tmp_path, KEY)
    size = sum(path.stat().st_size for path in (tmp_path / KEY).rglob("*") if path.is_file())
    assert Cache(tmp_path).remove(KEY) == size
    assert [entry.key for entry in Cache(tmp_path).entries()] == [OTHER]
    assert not (tmp_path / f"{KEY}.lock").exists()


def test_locked_entry_is_not_removed(tmp_path: Path) -> None:
    store_entry(tmp_path)
    (tmp_path / f"partial-{KEY}").mkdir()
    with Cache(tmp_path).lock(KEY, lambda: None):
        assert Cache(tmp_path).remove(KEY) is None
        assert Cache(tmp_path).remove_partial() == 0
    assert Cache(tmp_path).find(KEY) is not None
    assert partial_folders(tmp_path) == [f"partial-{KEY}"]


@pytest.mark.parametrize("use", [obtain, lambda root: Cache(root).entries()])
def test_cache_path_that_is_a_file_raises_storage_error(tmp_path: Path, use: Callable[[Path], Any]) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError, match="cannot be used") as caught:
        use(tmp_path / "cache")
    assert caught.value.exit_code == 3
    assert str(tmp_path / "cache") in str(caught.value)


def test_full_disk_error_suggests_cache_prune(tmp_path: Path) -> None:
    def fill(content: Path) -> Mapping[str, Any]:
        raise OSError(28, os.strerror(28), str(content / "weights"))

    with pytest.raises(StorageError, match=r"The disk is full\.(?s:.)*weights(?s:.)*compress cache prune"):
        obtain(tmp_path, fill)
    assert partial_folders(tmp_path) == []


def _compete(root: Path, seconds: float, log: Path, ready: Any) -> None:
    def make(content: Path) -> Mapping[str, Any]:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(seconds)
        return write(content)

    ready.wait()
    _, cached, messages = obtain(root, make)
    with log.open("a") as file:
        file.write(f"cached={cached} {' '.join(messages)}\n")


def test_of_two_processes_one_writes_entry_and_other_waits(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, log = spawn.Barrier(2), tmp_path / "log"
    both = [spawn.Process(target=_compete, args=(tmp_path / "cache", 0.5, log, ready)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(log.read_text().splitlines()) == ["cached=False ", "cached=True waits", "made"]


def _write_and_hang(root: Path, began: Any) -> None:
    def make(content: Path) -> Mapping[str, Any]:
        write(content)
        began.set()
        time.sleep(60)
        return {"name": "late"}

    obtain(root, make)


def test_writer_killed_with_sigkill_releases_its_lock(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    began = spawn.Event()
    writer = spawn.Process(target=_write_and_hang, args=(tmp_path, began))
    writer.start()
    assert began.wait(20)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(20)
    assert partial_folders(tmp_path) == [f"partial-{KEY}"]
    entry, cached, messages = obtain(tmp_path)
    assert (cached, messages, partial_folders(tmp_path)) == (False, [], [])
    assert Cache(tmp_path).find(KEY) == entry
