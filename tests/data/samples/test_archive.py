"""Tests of archive extraction: unsafe, incomplete and damaged zip and tar files."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from compress.data.samples.fetch import extract
from compress.utils.errors import SampleError


def zip_with(path: Path, name: str, *, link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fine.txt", "fine")
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK | 0o777 if link else stat.S_IFREG | 0o644) << 16
        archive.writestr(entry, "/etc/passwd" if link else "evil")
    return path


def tar_with(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        fine = tarfile.TarInfo("fine.txt")
        fine.size = 4
        archive.addfile(fine, io.BytesIO(b"fine"))
        entry = tarfile.TarInfo(name)
        entry.type = kind
        if kind == tarfile.REGTYPE:
            entry.size = 4
        else:
            entry.linkname = "/etc/passwd"
        archive.addfile(entry, io.BytesIO(b"evil"))
    return path


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "C:/evil.txt", "..\\evil.txt"])
@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_archive_with_path_outside_folder_is_rejected(tmp_path, name, make):
    archive = make(tmp_path / "archive", name)
    folder = tmp_path / "inner" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(SampleError, match="points outside"):
        extract(archive, {"fine.txt": "fine.txt", name: "evil.txt"}, folder)
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "inner" / "evil.txt").exists()


def test_symbolic_link_in_zip_is_rejected(tmp_path):
    archive = zip_with(tmp_path / "a.zip", "link", link=True)
    with pytest.raises(SampleError, match="'link' is a link or a device"):
        extract(archive, {"fine.txt": "fine.txt"}, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_tar_are_rejected(tmp_path, kind):
    archive = tar_with(tmp_path / "a.tar.gz", "link", kind)
    with pytest.raises(SampleError, match="'link' is a link or a device"):
        extract(archive, {"fine.txt": "fine.txt"}, tmp_path / "out")


@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_only_listed_members_are_extracted_and_renamed(tmp_path, make):
    archive = make(tmp_path / "archive", "other/extra.txt")
    extract(archive, {"fine.txt": "sub/renamed.txt"}, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [tmp_path / "out" / "sub" / "renamed.txt"]
    assert files[0].read_text() == "fine"
    assert not files[0].stat().st_mode & 0o111


@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_missing_member_is_reported(tmp_path, make):
    archive = make(tmp_path / "archive", "extra.txt")
    with pytest.raises(SampleError, match=r"lacks absent\.txt"):
        extract(archive, {"absent.txt": "absent.txt"}, tmp_path / "out")


@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_truncated_archive_is_rejected(tmp_path, make):
    archive = make(tmp_path / "archive", "extra.txt")
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(SampleError, match="damaged"):
        extract(archive, {"fine.txt": "fine.txt"}, tmp_path / "out")


def test_damaged_zip_content_is_detected(tmp_path):
    archive = zip_with(tmp_path / "a.zip", "extra.txt")
    archive.write_bytes(archive.read_bytes().replace(b"fine.txtfine", b"fine.txtfilm"))
    with pytest.raises(SampleError, match="damaged"):
        extract(archive, {"fine.txt": "fine.txt"}, tmp_path / "out")
