"""Debian packages as samples, with packages built here; apt-get itself is played by a script that hands one over."""

import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from compress.data.samples import clients
from compress.data.samples.clients import apt_download, unpacked_tar
from compress.data.samples.fetch import fetch
from compress.data.samples.sample import Package, Sample, find_sample
from compress.utils.errors import SampleError

NO_NETWORK = """Err:1 http://mirror/debian trixie/main amd64 tiny all 1.0-1
  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
E: Failed to fetch http://mirror/debian/pool/main/t/tiny_1.0-1_all.deb  Unable to connect to 127.0.0.1:9:"""

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian package manager here")


def debian_package(folder: Path, name: str, link: str | None = None) -> Package:
    """A package file made by Debian's own tool, and the entry that pins it."""
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
    """Writes an `apt-get` that runs the given lines, before all others on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(lines: str) -> None:
        (folder / "apt-get").write_text(f"#!/bin/sh\n{lines}\n")
        (folder / "apt-get").chmod(0o755)

    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return write


@needs_dpkg
def test_members_and_licences_of_every_package_are_kept(tmp_path, progress, apt):
    sample = two_packages(tmp_path)
    apt(f'test "$1" = download || exit 9; for last; do :; done; cp "{tmp_path}/${{last%%=*}}_${{last#*=}}_all.deb" .')
    files = fetch(sample, tmp_path / "cache", progress)
    assert {path.relative_to(files).as_posix(): path.read_text() for path in files.rglob("*.txt")} == {
        "first/data.txt": "data of first",
        "second/data.txt": "data of second",
    }
    assert (files.parent / "LICENSE-second.txt").read_text() == "licence of second"


@needs_dpkg
def test_another_digest_is_refused_before_the_package_is_opened(tmp_path, progress, apt, monkeypatch):
    package = debian_package(tmp_path, "first")
    sample = replace(two_packages(tmp_path / "other"), packages=(replace(package, sha256="0" * 64),))
    apt(f"cp {tmp_path}/first_1.0-1_all.deb .")
    monkeypatch.setattr("compress.data.samples.fetch.unpacked_tar", lambda path: pytest.fail("it was opened"))
    with pytest.raises(SampleError, match="another digest") as caught:
        fetch(sample, tmp_path / "cache", progress)
    assert package.sha256 in str(caught.value)


@needs_dpkg
def test_a_package_with_a_link_is_refused(tmp_path, progress, apt):
    sample = two_packages(tmp_path, link="/etc/passwd")
    apt(f"cp {tmp_path}/first_1.0-1_all.deb .")
    with pytest.raises(SampleError, match="link or a device"):
        fetch(sample, tmp_path / "cache", progress)


@needs_dpkg
def test_a_truncated_package_is_damaged(tmp_path):
    package = debian_package(tmp_path, "first")
    path = tmp_path / package.filename
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SampleError, match=r"first_1\.0-1_all\.deb is damaged"):
        unpacked_tar(path)


VERSES = find_sample("verses").packages[0]


@pytest.mark.parametrize("missing", ["apt-get", "dpkg-deb"])
def test_without_apt_the_way_round_is_told(tmp_path, progress, monkeypatch, missing):
    found = lambda tool: None if tool == missing else f"/usr/bin/{tool}"  # noqa: E731
    monkeypatch.setattr(clients.shutil, "which", found)
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
def test_what_apt_says_is_told_with_the_release_that_is_needed(tmp_path, progress, apt, written, told):
    apt(written)
    place = tmp_path / "download"
    place.mkdir()
    with pytest.raises(SampleError, match=told) as caught:
        apt_download("verses", VERSES, place, progress)
    assert "apt-get download sword-text-kjv=22.29-1" in str(caught.value)
    assert VERSES.filename in str(caught.value)


def test_a_disk_that_fills_is_no_network_problem(tmp_path, progress, apt):
    apt('echo "E: Write error - write (28: No space left on device)"; exit 100')
    place = tmp_path / "download"
    place.mkdir()
    with pytest.raises(OSError, match="No space left"):
        apt_download("verses", VERSES, place, progress)
