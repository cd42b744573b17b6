"""A registry's log whose lines are chained correctly but say what cannot be is damaged, and is not fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from registry import write_run

from compress.plugins.registry.log import LOG, line_check
from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.remote import Remote, fetch, push, without_password
from compress.utils.errors import CompressError, InputError

pytest.importorskip("fsspec")

MODEL = "model/onnx/model.onnx"
WHEN = {"at": "2026-01-01T00:00:00+00:00", "who": "a"}
GATE = {"against": None, "status": "passed"}
PROMOTED = {"kind": "promoted", "name": "m", "version": 1, "alias": "champion", "before": None, "gate": GATE, **WHEN}
LIES: dict[str, dict[str, Any]] = {
    "promotes a missing version": {**PROMOTED, "version": 77},
    "promotes a missing model": {**PROMOTED, "name": "other"},
    "has no date": {**PROMOTED, "at": "x"},
    "has a date without an offset": {**PROMOTED, "at": "2026-01-01T00:00:00"},
    "has an alias with a line break": {**PROMOTED, "alias": "champion\n"},
    "retires a missing version": {"kind": "retired", "name": "m", "version": 2, **WHEN},
    "removes a missing version": {"kind": "collected", "versions": [["m", 9]], **WHEN},
    "rolls back to what never was": {
        **{"kind": "rolled back", "name": "m", "version": 1, "alias": "champion", "before": 1}, **WHEN
    },
    "repeats a version": {"kind": "registered", "name": "m", "version": 1, "record": "0" * 64, "run": "", **WHEN},
    "leaves versions out": {"kind": "registered", "name": "m", "version": 9, "record": "0" * 64, "run": "", **WHEN},
}  # fmt: skip


def add_line(log: Path, body: bytes) -> None:
    """Add a line with a valid check."""
    last = log.read_bytes().splitlines()[-1][:64] if log.exists() else b""
    with log.open("ab") as file:
        file.write(line_check(last, body) + b" " + body + b"\n")


@pytest.mark.parametrize("lie", LIES)
def test_log_that_contradicts_itself_is_damaged_and_not_fetched(tmp_path: Path, lie: str) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register(write_run(tmp_path / "run", b"weights"), "m")
    url = f"file://{tmp_path}/remote"
    push(registry, Remote(url))
    shutil.copytree(registry.root, tmp_path / "sound")
    add_line(registry.root / LOG, json.dumps(LIES[lie]).encode())
    with pytest.raises(InputError, match="Line 3 of the registry's log is damaged"):
        Registry(registry.root).state()
    # What lies there as a remote reaches no other registry.
    (part,) = (tmp_path / "remote/log").iterdir()
    add_line(part, json.dumps(LIES[lie]).encode())
    other = Registry(tmp_path / "sound")
    before = (other.root / LOG).read_bytes()
    with pytest.raises(InputError, match="Line 3 of the registry's log is damaged"):
        fetch(other, Remote(url))
    assert (other.root / LOG).read_bytes() == before
    assert other.state().find("m@1").number == 1


@pytest.mark.parametrize("start", [b"[]", b'{"version": ' + b"1" * 5000 + b"}", b"[" * 100_000, b"1"])
def test_log_with_a_strange_first_line_is_damaged(tmp_path: Path, start: bytes) -> None:
    registry = Registry(tmp_path)
    add_line(tmp_path / LOG, start)
    with pytest.raises(InputError, match="Line 1 of the registry's log is damaged"):
        registry.state()


@pytest.mark.parametrize("reference", ["m@" + "1" * 5000, "m@00", "m@0"])
def test_reference_to_no_version_is_refused(tmp_path: Path, reference: str) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register(write_run(tmp_path / "run", b"weights"), "m")
    with pytest.raises(InputError, match="There is no version"):
        registry.state().find(reference)
    with pytest.raises(InputError, match="cannot be the name of"):
        registry.register(tmp_path / "run", "name\n")


@pytest.mark.parametrize("scheme", ["sftp", "http", "ftp", "nosuch"])
def test_password_in_an_address_is_not_shown(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://user:SECRET@pass@127.0.0.1:1/folder"
    with pytest.raises(CompressError) as caught:
        push(Registry(tmp_path), Remote(url))
    assert "SECRET" not in f"{caught.value} {json.dumps(caught.value.as_dict())}"
    assert without_password("s3://bucket/a:b@c") == "s3://bucket/a:b@c"


def test_rollback_reads_the_bytes_of_the_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for number in (1, 2):
        version, _ = registry.register(write_run(tmp_path / f"run{number}", b"weights%d" % number), "m")
        promote(registry, PromotionRequest(version.reference))
    damaged = registry.objects.path(registry.contents(registry.state().find("m@1")).files[MODEL].sha256)
    damaged.write_bytes(b"WEIGHTS1")
    with pytest.raises(InputError, match="m@1"):
        registry.rollback("m", "champion")
    assert registry.state().find("m@champion").number == 2
