"""npm is told to run no script; what it brings is refused unless it is the pinned file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from compress.data.samples.fetch import fetch
from compress.data.samples.sample import Package, Sample
from compress.utils.digests import digest_file
from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress

NPM = """#!/bin/sh
echo "$@" >> {log}
test -f {archive} || {{ echo "npm error code E404"; echo "npm error 404 Not Found - @toy/thing" ; exit 1; }}
cp {archive} "$7/toy-thing-1.0.0.tgz"
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that an npm on PATH, a stand-in for the real one, brings."""
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


def test_the_pinned_file_is_unpacked_and_no_script_runs(archive: Path, tmp_path: Path) -> None:
    folder = fetch(sample(digest_file(archive)), tmp_path / "cache", SilentProgress())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"thing.mjs": b"export {}"}
    said = (tmp_path / "log").read_text()
    assert said.startswith("pack --ignore-scripts ")
    assert said.endswith(" @toy/thing@1.0.0\n")


def test_another_file_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=f"(?s)another digest.*SHA-256 {digest_file(archive)}"):
        fetch(sample("0" * 64), tmp_path / "cache", SilentProgress())


def test_what_npm_says_is_told(archive: Path, tmp_path: Path) -> None:
    archive.unlink()
    with pytest.raises(SampleError, match=r"@toy/thing@1\.0\.0 cannot be fetched: npm error 404 Not Found"):
        fetch(sample("0" * 64), tmp_path / "cache", SilentProgress())


def test_without_npm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SampleError, match="npm, which is not on PATH"):
        fetch(sample("0" * 64), tmp_path / "cache", SilentProgress())
