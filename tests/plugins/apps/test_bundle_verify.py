"""Tests of bundle verification: changed bytes, false manifests and self-tests, signatures and malicious zip files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ssh_keys import new_key
from toy_bundles import changed_json, reseal, set_field

from compress.plugins.apps import archive
from compress.plugins.apps.archive import seal, unpack
from compress.plugins.apps.build import Bundle
from compress.plugins.apps.manifest import MANIFEST, SIGNATURE, SIGNED
from compress.plugins.apps.verify import verify
from compress.utils.errors import BundleError, InputError
from compress.utils.ssh_signatures import sign_file

TRIES = 120


@pytest.fixture(params=["text", "image", "sentence"])
def made(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Bundle:
    """Return the bundle of each kind of model."""
    return bundles[request.param]


def test_intact_bundle_passes(made: Bundle) -> None:
    expected = {
        "text-classification": ("toy", 10, "texts", "scores"),
        "image-classification": ("toy-images", 6, "pictures", "scores"),
        "feature-extraction": ("toy", 14, "texts", "embeddings"),
    }
    for path in (made.folder, made.archive):
        verdict = verify(path)
        assert (verdict.name, verdict.cases, verdict.of, verdict.compared) == expected[made.manifest.task]
        assert verdict.signer is None
        assert verdict.worst < 0.01


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_changed_file_in_the_zip_is_named(made: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(made.archive, tmp_path / "copy.zip"))
    with zipfile.ZipFile(copy) as opened:
        entry = max(opened.infolist(), key=lambda entry: entry.compress_size)
    content = bytearray(copy.read_bytes())
    content[entry.header_offset + entry.compress_size // 2] ^= 1
    copy.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=f"written: {re.escape(entry.filename)} does not have its checksum"):
        verify(copy)


def test_flipped_bit_in_the_zip_is_detected(made: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(made.archive, tmp_path / "copy.zip"))
    chance, size = random.Random(0), copy.stat().st_size
    places = [*range(size - 140, size), *(chance.randrange(size) for _ in range(TRIES))]
    for offset in places:
        bit = chance.randrange(8)
        flip(copy, offset, bit)
        with pytest.raises(BundleError):
            verify(copy)
        flip(copy, offset, bit)
    verify(copy)


def test_flipped_bit_in_the_folder_is_detected(bundle: Path, tmp_path: Path) -> None:
    key, chance = new_key(tmp_path), random.Random(1)
    for number in range(TRIES):
        if number == TRIES // 2:
            sign_file(bundle, key, SIGNED)
        # Every second trial changes a file that has no listed digest: the manifest or its signature.
        seal_files = [path for path in (bundle / MANIFEST, bundle / SIGNATURE) if path.exists()]
        files = seal_files if number % 2 else sorted(path for path in bundle.rglob("*") if path.is_file())
        path = chance.choice(files)
        offset, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, offset, bit)
        with pytest.raises(BundleError):
            verify(bundle)
        flip(path, offset, bit)
    verify(bundle)
    # ssh-keygen ignores this change: a line feed of the signature becomes a vertical tab.
    flip(bundle / SIGNATURE, (bundle / SIGNATURE).read_bytes().index(b"\n", 40), 0)
    with pytest.raises(BundleError, match="signature was changed"):
        verify(bundle)


def test_added_missing_and_linked_files_are_detected(bundle: Path) -> None:
    (bundle / "model" / "more.txt").write_text("x")
    with pytest.raises(BundleError, match=r"not listed: model/more\.txt"):
        verify(bundle)
    (bundle / "model" / "more.txt").unlink()
    (bundle / "README.md").rename(bundle.parent / "README.md")
    with pytest.raises(BundleError, match=r"missing: README\.md"):
        verify(bundle)
    (bundle / "README.md").symlink_to(bundle.parent / "README.md")
    with pytest.raises(BundleError, match="holds a link or a device"):
        verify(bundle)
    (bundle / "README.md").unlink()
    os.mkfifo(bundle / "README.md")
    with pytest.raises(BundleError, match="holds a link or a device"):
        verify(bundle)


@pytest.mark.parametrize(
    ("made", "change", "expected"),
    [
        ("text", set_field("inputs.0.shape", ["batch_size", 64]), r"says inputs input_ids int64 \['batch_size', 64\]"),
        ("text", set_field("outputs.0.dtype", "float16"), "says outputs logits float16"),
        ("text", set_field("opsets", {"ai.onnx": 99}), "says opsets {'ai.onnx': 99}"),
        ("text", set_field("postprocessing.labels", ["good", "bad"]), r"says labels \('good', 'bad'\)"),
        ("text", set_field("preprocessing.prefix_ids", []), "self-test fails at case 1"),
        ("text", set_field("model", "../elsewhere.onnx"), "names a file outside the bundle"),
        ("sentence", set_field("postprocessing.pooling", "max"), "says pooling max"),
        ("sentence", set_field("postprocessing.dimensions", 255), "says dimensions 255"),
        ("sentence", set_field("preprocessing.max_length", 15), "self-test fails at case 11"),
        ("image", set_field("preprocessing.resize.filter", "bilinear"), "case 1, 'samples/1.png': prepared value"),
        ("image", set_field("preprocessing.resize.shortest_edge", 8192), "would be resized to 10922 x 8192"),
        ("image", set_field("preprocessing.mean", [0.4, 0.5, 0.601]), "case 1, 'samples/1.png': prepared value"),
    ],
    indirect=["made"],
)
def test_false_manifest_is_detected(bundle: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    reseal(bundle, change)
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


def test_different_model_outputs_fail_the_self_test(bundle: Path) -> None:
    with changed_json(bundle / "selftest.json") as test:
        answer = test["cases"][3].get("logits") or test["cases"][3]["embedding"]
        answer[0] += 3 * test["tolerance"]
    reseal(bundle)
    with pytest.raises(BundleError, match="self-test fails at case 4"):
        verify(bundle)


def test_signature_of_another_key_is_refused(bundle: Path, tmp_path: Path) -> None:
    key, other = new_key(tmp_path), new_key(tmp_path / "other")
    public = key.with_suffix(".pub")
    with pytest.raises(BundleError, match="not signed"):
        verify(bundle, public)
    sign_file(bundle, key, SIGNED)
    shown = subprocess.run(["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True).stdout
    assert verify(bundle, public).signer in shown.split()
    with pytest.raises(BundleError, match="Another key signed"):
        verify(bundle, other.with_suffix(".pub"))
    with pytest.raises(InputError, match="no public key"):
        verify(bundle, key)
    reseal(bundle, lambda fields: fields.update(name="other"))
    with pytest.raises(BundleError, match="signature does not fit"):
        verify(bundle)


def evil(target: Path, entries: list[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    """Write a malicious zip with a valid seal, so that the seal is not what refuses it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry, content in entries:
            packed.writestr(entry, content, zipfile.ZIP_DEFLATED)
        packed.comment = archive._MARK + b"0" * 64
    seal(target)
    return target


def listing(**sizes: int) -> tuple[zipfile.ZipInfo, bytes]:
    """Return a manifest entry with the parts that unpacking reads: the files' sizes."""
    return zipfile.ZipInfo(MANIFEST), json.dumps({"files": {k: {"size_bytes": v} for k, v in sizes.items()}}).encode()


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([listing(), (zipfile.ZipInfo("../x"), b"x")], "'../x' points outside"),
        ([listing(), (zipfile.ZipInfo("/etc/x"), b"x")], "'/etc/x' points outside"),
        ([listing(), (zipfile.ZipInfo("C:/x"), b"x")], "'C:/x' points outside"),
        ([listing(), (zipfile.ZipInfo("a/./x"), b"x")], "'a/./x' is not written as a plain path"),
        ([listing(x=4), (link("x"), b"/etc")], "'x' is a link"),
        ([listing(x=1), (zipfile.ZipInfo("x"), b"x"), (zipfile.ZipInfo("X"), b"x")], "'X' stands twice"),
        ([listing(x=1), (zipfile.ZipInfo("x"), b"xx")], "'x' unpacks to 2 bytes"),
        ([listing(x=1), (zipfile.ZipInfo("x"), b"x"), (zipfile.ZipInfo("X/y"), b"x")], "'X/y' lies below another"),
        ([listing(x=1)], "list other files: x"),
        ([(zipfile.ZipInfo("x"), b"x")], "has no manifest.json"),
    ],
)
def test_malicious_zips_write_no_files(
    tmp_path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]], expected: str
) -> None:
    (tmp_path / "into").mkdir()
    with pytest.raises(BundleError, match=re.escape(expected)):
        unpack(evil(tmp_path / "evil.zip", entries), tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    size = 120_000_000
    bomb = evil(tmp_path / "bomb.zip", [listing(x=size), (zipfile.ZipInfo("x"), bytes(size))])
    assert bomb.stat().st_size < 200_000
    with pytest.raises(BundleError, match="would expand to 120,000,043 bytes"):
        unpack(bomb, tmp_path / "into")
    # A zip whose two headers claim a small size for a large file; its seal is valid.
    liar = evil(tmp_path / "liar.zip", [listing(x=10), (zipfile.ZipInfo("x"), bytes(5_000_000))])
    content = liar.read_bytes().replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    liar.write_bytes(content)
    seal(liar)
    with pytest.raises(BundleError):
        unpack(liar, tmp_path / "into")
    assert sum(path.stat().st_size for path in (tmp_path / "into").rglob("*")) < 2000


def test_repacked_zip_is_refused(made: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "again.zip", "w") as packed:
        for path in made.folder.rglob("*"):
            packed.write(path, path.relative_to(made.folder))
    with pytest.raises(BundleError, match="is a folder"):
        verify(tmp_path / "again.zip")
    with pytest.raises(BundleError, match="zip is damaged"):
        verify(made.folder / MANIFEST)


def _turned(test: dict[str, Any]) -> None:
    """Raise the tolerance to 100 and negate one embedding."""
    test["tolerance"] = 100.0
    test["cases"][2]["embedding"] = [-value for value in test["cases"][2]["embedding"]]


@pytest.mark.parametrize(
    ("made", "change", "expected"),
    [
        ("image", set_field("cases.0.image", "../../etc/hosts"), "uses files that are not listed: ../../etc/hosts"),
        ("image", set_field("cases.0.image", "README.md"), "picture of the self-test cannot be read"),
        ("image", set_field("cases.0.pixels", [0.0]), "64 prepared values|1 prepared values"),
        ("image", set_field("cases", [{"text": "a", "input_ids": [1], "logits": [0, 0]}]), "does not have pictures"),
        ("sentence", set_field("cases.4.embedding", [0.1]), r"embeddings \[.* and 248 more"),
        ("sentence", set_field("cases", [{"text": "a", "input_ids": [1], "logits": [0, 0]}]), "expects no embeddings"),
        ("sentence", set_field("cases.4.text", "\ud800"), "cannot be read: it has an unpaired surrogate"),
        ("sentence", _turned, "case 3, .*: its cosine is -1.000000"),
    ],
    indirect=["made"],
)
def test_false_self_test_is_detected(bundle: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    with changed_json(bundle / "selftest.json") as test:
        change(test)
    reseal(bundle)
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


@pytest.mark.parametrize("made", ["text"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "field", "expected"),
    [
        ("image", "preprocessing", "prepare-image is no preprocessing for text-classification"),
        ("sentence", "postprocessing", "embed is no postprocessing for text-classification"),
    ],
)
def test_processing_steps_of_another_task_are_refused(
    bundle: Path, bundles: dict[str, Bundle], kind: str, field: str, expected: str
) -> None:
    fields = json.loads((bundle / MANIFEST).read_text())
    other = json.loads((bundles[kind].folder / MANIFEST).read_text())[field]
    (bundle / MANIFEST).write_text(json.dumps({**fields, field: other}))
    with pytest.raises(BundleError, match=expected):
        verify(bundle)
