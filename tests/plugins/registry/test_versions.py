"""Tests of registries: versions, promotion, rollback, damage, garbage collection and concurrent writers."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from disks import mounted
from imported import packages_imported_by
from registry import flip_bytes, write_run
from typer.testing import CliRunner

from compress.cli import app
from compress.plugins.registry import registry as registry_module
from compress.plugins.registry.log import line_check
from compress.plugins.registry.promotion import PromotionRequest, promote, tracked_versions
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.state import GateOutcome, Promoted
from compress.plugins.registry.upkeep import Fault, collect, verify
from compress.report.tracking import mirror
from compress.results.report import LimitResult, load_report
from compress.utils.errors import InputError, StorageError
from compress.utils.storage import digest_directory, digest_file

MODEL = "model/onnx/model.onnx"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def register(registry: Registry, content: bytes, **made: Any) -> int:
    """Register a version whose model has these bytes and return its number."""
    run = write_run(registry.root.parent / f"run {content.decode()}", content, **made)
    return registry.register(run, "reviews")[0].number


def champions(registry: Registry, *contents: bytes) -> None:
    """Register and promote one version for each content."""
    for content in contents:
        promote(registry, PromotionRequest(f"reviews@{register(registry, content)}"))


def test_files_are_linked_once_and_equal_runs_are_one_version(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", b"weights")
    version, new = registry.register(run, "reviews", note="the first")
    assert (version.reference, new, version.note) == ("reviews@1", True, "the first")
    assert version.summary == "Accuracy 90.00%, 1.00 kB on cpu"
    assert registry.register(run, "reviews") == (version, False)
    assert registry.register(run, "other")[0].reference == "other@1"
    contents = registry.verified(version)
    assert set(contents.files) == {"report.json", "recipe.yaml", "lock.json", "model/config.json", MODEL}
    assert contents.model_digest == digest_directory(run / "model")
    held = registry.objects.path(contents.files[MODEL].sha256)
    assert held.samefile(run / MODEL)
    assert len(registry.objects.names()) == len(contents.files) + 1
    assert verify(registry) == ()


def test_files_are_copied_where_links_are_impossible(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    run = write_run(tmp_path / "run", b"weights")
    version, _ = registry.register(run, "reviews")
    held = registry.objects.path(registry.verified(version).files[MODEL].sha256)
    assert held.read_bytes() == b"weights" and not held.samefile(run / MODEL)


def test_run_without_report_is_refused_and_leaves_no_files(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", b"weights")
    (run / "report.json").unlink()
    with pytest.raises(InputError, match="There is no report"):
        registry.register(run, "reviews")
    with pytest.raises(InputError, match="no registry here"):
        registry.state()
    assert list((registry.root / "incoming").iterdir()) == []


def test_bundle_must_belong_to_the_run(registry: Registry, tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", b"weights"), write_run(tmp_path / "other", b"others", accuracy=0.8)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    made_of = digest_file(run / "report.json")
    (bundle / "manifest.json").write_text(json.dumps({"provenance": {"report_sha256": made_of}}))
    with pytest.raises(InputError, match="made of another run"):
        registry.register(other, "reviews", bundle)
    version, _ = registry.register(run, "reviews", bundle)
    assert "bundle/manifest.json" in registry.contents(version).files


def test_unknown_references_suggest_the_nearest_name(registry: Registry) -> None:
    champions(registry, b"a")
    state = registry.state()
    for reference, message in (
        ("reviews@champoin", "Did you mean 'champion'"),
        ("reveiws@1", "Did you mean 'reviews'"),
        ("reviews@2", "no version 2"),
        ("reviews", "names no version"),
        ("reviews@", "names no version"),
    ):
        with pytest.raises(InputError, match=message):
            state.find(reference)
    for name in ("", "a/b", "-x", "a@b", "../x"):
        with pytest.raises(InputError, match="cannot be the name"):
            registry.register(Path("anywhere"), name)
    for alias in ("12", "latest"):
        with pytest.raises(InputError, match="cannot be the name of an alias"):
            promote(registry, PromotionRequest("reviews@1", alias=alias))


def test_latest_skips_retired_versions(registry: Registry) -> None:
    for content in (b"a", b"b", b"c"):
        register(registry, content)
    assert registry.state().find("reviews@latest").number == 3
    registry.retire("reviews@3")
    assert registry.state().find("reviews@latest").number == 2


def test_worse_version_needs_force_and_a_reason(registry: Registry) -> None:
    champions(registry, b"good")
    register(registry, b"bad", accuracy=0.5)
    refused = promote(registry, PromotionRequest("reviews@2"))
    assert refused.refused and refused.judged.against == 1
    assert "accuracy on cpu" in refused.judged.failed[0]
    assert registry.state().aliases("reviews") == {"champion": 1}
    with pytest.raises(InputError, match="needs a reason"):
        promote(registry, PromotionRequest("reviews@2", force=True))
    done = promote(registry, PromotionRequest("reviews@2", force=True, why="the other is not licensed"))
    newest_entry = registry.state().entries[-1]
    assert newest_entry == done.entry and isinstance(newest_entry, Promoted)
    assert (newest_entry.forced, newest_entry.why) == (True, "the other is not licensed")
    assert (newest_entry.gate.status, newest_entry.before) == ("failed", 1)
    assert promote(registry, PromotionRequest("reviews@2")).already
    assert registry.state().entries[-1] == newest_entry
    # Version 1 is better than the current champion.
    assert promote(registry, PromotionRequest("reviews@1")).judged == GateOutcome(against=2, status="passed")


def test_promotion_uses_the_gate_of_the_version(registry: Registry, tmp_path: Path) -> None:
    champions(registry, b"small")
    run = write_run(tmp_path / "larger", b"larger", size=1001)
    version, _ = registry.register(run, "reviews")
    assert "size_bytes" in promote(registry, PromotionRequest(version.reference)).judged.failed[0]
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").write_text("name: made\ngate:\n  rules:\n  - {metric: size_bytes, worse_by: 1%}\n")
    version, _ = registry.register(run, "reviews")
    assert not promote(registry, PromotionRequest(version.reference)).refused


def test_version_that_missed_its_limits_is_refused(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", b"weights")
    limit = LimitResult(metric="accuracy", target="cpu", limit=">= 95%", value=0.9, passed=False)
    report = load_report(run / "report.json").model_copy(update={"limits": (limit,)})
    (run / "report.json").write_text(report.to_json())
    registry.register(run, "reviews")
    refused = promote(registry, PromotionRequest("reviews@1"))
    assert refused.refused and refused.judged.failed == ("its own limit was missed: accuracy \u2265 95%",)


def test_promotion_is_checked_again_after_a_concurrent_one(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    champions(registry, b"bad")
    register(registry, b"better", accuracy=0.99, rows=2000)
    register(registry, b"good", accuracy=0.95, rows=2000)
    verified, others = registry.verified, []

    def meanwhile(version: Any) -> Any:
        if not others:
            others.append(promote(Registry(registry.root), PromotionRequest("reviews@2")))
        return verified(version)

    monkeypatch.setattr(registry, "verified", meanwhile)
    done = promote(registry, PromotionRequest("reviews@3"))
    assert done.refused and done.judged.against == 2
    assert registry.state().aliases("reviews") == {"champion": 2}


def test_rollback_goes_back_step_by_step_without_copies(registry: Registry, tmp_path: Path) -> None:
    champions(registry, b"a", b"b", b"c")
    inodes_before = {path: path.stat().st_ino for path in registry.objects.folder.iterdir()}
    assert registry.rollback("reviews", "champion", why="it is slow").before == 3
    registry.pull("reviews@champion", tmp_path / "served")
    assert (tmp_path / "served" / MODEL).read_bytes() == b"b"
    assert registry.rollback("reviews", "champion").version == 1
    with pytest.raises(InputError, match="nothing to go back to"):
        registry.rollback("reviews", "champion")
    assert {path: path.stat().st_ino for path in registry.objects.folder.iterdir()} == inodes_before
    champions(registry, b"d")
    assert registry.rollback("reviews", "champion").version == 1
    assert Registry(registry.root).state().stacks == registry.state().stacks


def test_rollback_skips_retired_and_refuses_missing_versions(registry: Registry) -> None:
    champions(registry, b"a", b"b", b"c")
    registry.retire("reviews@2")
    with pytest.raises(InputError, match="is the champion"):
        registry.retire("reviews@3")
    with pytest.raises(InputError, match="was retired"):
        promote(registry, PromotionRequest("reviews@2"))
    state = registry.state()
    registry.objects.path(registry.contents(state.find("reviews@1")).files[MODEL].sha256).unlink()
    with pytest.raises(InputError, match=f"{MODEL} is missing"):
        registry.rollback("reviews", "champion")
    registry.register(registry.root.parent / "run a", "reviews")
    assert registry.rollback("reviews", "champion").version == 1


def test_pull_verifies_files_and_replaces_earlier_pulls_only(registry: Registry, tmp_path: Path) -> None:
    champions(registry, b"a", b"b")
    output = tmp_path / "deep" / "served"
    registry.pull("reviews@1", output)
    assert digest_directory(output / "model") == digest_directory(tmp_path / "run a" / "model")
    with pytest.raises(InputError, match="something here already"):
        registry.pull("reviews@2", output)
    registry.pull("reviews@2", output, replace=True)
    assert json.loads((output / "version.json").read_text())["version"] == 2
    held = registry.objects.path(registry.contents(registry.state().find("reviews@1")).files[MODEL].sha256)
    held.unlink()
    held.write_bytes(b"A")
    with pytest.raises(StorageError, match=f"{MODEL} of reviews@1 is damaged"):
        registry.pull("reviews@1", output, replace=True)
    assert (output / MODEL).read_bytes() == b"b"
    assert [path.name for path in output.parent.iterdir()] == ["served"]
    with pytest.raises(InputError, match="something here already"):
        registry.pull("reviews@2", tmp_path / "run a", replace=True)


def test_garbage_collection_keeps_files_in_use(registry: Registry, tmp_path: Path) -> None:
    champions(registry, b"a", b"b", b"c")
    runs = tmp_path / "runs"
    register(registry, b"d")
    for number in (1, 2):
        registry.retire(f"reviews@{number}")
    child = write_run(runs / "child" / "2026-01-01", b"child")
    (child / "lock.json").write_text(json.dumps({"start": digest_directory(tmp_path / "run b" / "model")}))
    names_before = registry.objects.names()
    planned = collect(registry, runs, dry_run=True)
    assert planned.versions == ("reviews@1",) and "reviews@2" in planned.kept
    assert registry.objects.names() == names_before
    done = collect(registry, runs, dry_run=False)
    assert done == planned
    # The model and the list of files; the other files are shared with other versions.
    assert len(done.objects) == 2 and registry.objects.names() == names_before - set(done.objects)
    assert verify(registry) == ()
    state = registry.state()
    assert state.find("reviews@1").collected
    for number in (2, 3, 4):
        registry.verified(state.find(f"reviews@{number}"))
    with pytest.raises(InputError, match="its files are gone"):
        registry.pull("reviews@1", tmp_path / "pulled")
    assert collect(registry, runs, dry_run=False).objects == ()
    assert registry.register(tmp_path / "run a", "reviews")[0].number == 5


def test_truncated_last_log_line_is_removed(registry: Registry) -> None:
    champions(registry, b"a", b"b")
    registry.rollback("reviews", "champion")
    whole = registry.log.path.read_bytes()
    last = whole.rfind(b"\n", 0, -1) + 1
    for cut in (*range(last + 1, len(whole), 29), len(whole) - 1):
        registry.log.path.write_bytes(whole[:cut])
        fresh = Registry(registry.root)
        assert fresh.state().aliases("reviews") == {"champion": 2}
        assert [(fault.path, fault.fault) for fault in verify(fresh)] == [("log", "surplus")]
    fresh.rollback("reviews", "champion")
    assert Registry(registry.root).state().aliases("reviews") == {"champion": 1}
    assert verify(fresh) == ()


def test_log_with_damaged_line_is_not_extended(registry: Registry) -> None:
    champions(registry, b"a", b"b")
    whole = registry.log.path.read_bytes()
    for offset in (0, 64, 70, whole.find(b"\n"), len(whole) - 80, len(whole) - 1):
        registry.log.path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 8]) + whole[offset + 1 :])
        fresh = Registry(registry.root)
        with pytest.raises(InputError, match=r"Line \d+ of the registry's log is damaged"):
            fresh.rollback("reviews", "champion")
        assert [(fault.path, fault.fault) for fault in verify(fresh)] == [("log", "damaged")]
        registry.log.path.write_bytes(whole)


def test_registry_of_a_newer_version_is_not_modified(registry: Registry) -> None:
    registry.root.mkdir()
    body = b'{"kind":"began","at":"2030-01-01T00:00:00+00:00","who":"a later one","version":2}'
    registry.log.path.write_bytes(line_check(b"", body) + b" " + body + b"\n")
    for act in (registry.state, lambda: register(registry, b"a"), lambda: verify(registry)):
        with pytest.raises(InputError, match="newer than this compress reads"):
            act()
    assert registry.log.path.read_bytes().endswith(body + b"\n")


def test_log_order_is_kept_if_the_clock_is_set_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    registry.note = notes.append
    champions(registry, b"a", b"b")

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) - timedelta(days=1)

    monkeypatch.setattr(registry_module, "datetime", Yesterday)
    assert notes == []
    assert registry.rollback("reviews", "champion").version == 1
    assert "clock is behind" in notes[0]
    assert Registry(registry.root).state().aliases("reviews") == {"champion": 1}


def test_full_disk_leaves_an_intact_registry(tmp_path: Path) -> None:
    run, large = write_run(tmp_path / "run", b"weights"), write_run(tmp_path / "large", b"x" * 3_000_000, accuracy=0.91)
    with mounted(tmp_path / "disk", 2) as disk:
        registry = Registry(disk / "registry")
        registry.register(run, "reviews")
        with pytest.raises(StorageError, match="full"):
            registry.register(large, "reviews")
        assert verify(registry) == ()
        assert [version.number for version in registry.state().all()] == [1]
        promote(registry, PromotionRequest("reviews@1"))


def test_unexpected_files_are_named(registry: Registry) -> None:
    champions(registry, b"a")
    (registry.root / "notes.txt").write_text("mine")
    (registry.objects.folder / ("0" * 64)).write_bytes(b"")
    (registry.root / "incoming" / "killed").mkdir()
    faults = {(fault.path, fault.fault) for fault in verify(registry)}
    assert faults == {("notes.txt", "surplus"), (f"objects/{'0' * 64}", "damaged"), ("incoming/killed", "surplus")}
    collect(registry, registry.root / "none", dry_run=False)
    assert [fault.path for fault in verify(registry)] == ["notes.txt"]
    # Incoming files of a live writer are no fault and are kept.
    with registry.objects.incoming() as incoming:
        incoming.put(b"half")
        assert [fault.path for fault in verify(registry)] == ["notes.txt"]
        collect(registry, registry.root / "none", dry_run=False)
        assert list(incoming.folder.iterdir())


def test_missing_file_is_named_with_its_versions(registry: Registry) -> None:
    champions(registry, b"a", b"b")
    state = registry.state()
    digest = registry.contents(state.find("reviews@1")).files["model/config.json"].sha256
    registry.objects.path(digest).unlink()
    of = ("reviews@1 model/config.json", "reviews@2 model/config.json")
    assert verify(registry) == (Fault(path=f"objects/{digest}", fault="missing", of=of),)


def test_every_changed_byte_is_detected(tmp_path: Path) -> None:
    assert flip_bytes(tmp_path, 30) == (30, 30)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_mirror_has_the_versions_aliases_and_metrics(tmp_path: Path) -> None:
    mlflow, uri = pytest.importorskip("mlflow"), f"sqlite:///{tmp_path}/runs.db"
    registry = Registry(tmp_path / "registry")
    for number, accuracy in enumerate((0.9, 0.5)):
        registry.register(write_run(tmp_path / f"run-{number}", bytes([number]), accuracy), "reviews")
    promote(registry, PromotionRequest("reviews@1"))
    both = {"reviews@1": "1", "reviews@2": "2"}
    assert mirror(*tracked_versions(registry, "reviews"), uri, "reviews") == both
    registry.retire("reviews@2")
    promote(registry, PromotionRequest("reviews@1", alias="canary"))
    assert mirror(*tracked_versions(registry, "reviews"), uri, "reviews") == both
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert len(client.search_model_versions("name='reviews'")) == 2
    for alias in ("champion", "canary"):
        found = client.get_model_version_by_alias("reviews", alias)
        assert found.tags["compress.reference"] == "reviews@1"
    assert found.tags["compress.registry"] == str(registry.root)
    metrics = client.get_run(found.run_id).data.metrics
    assert metrics["accuracy/cpu"] == 0.9 and metrics["accuracy/cpu.low"] == pytest.approx(0.85)
    assert client.get_model_version("reviews", "2").tags["compress.retired"] == "true"


def answer(*arguments: str | Path, code: int = 0) -> Any:
    """Return the JSON output of a registry command."""
    result = CliRunner().invoke(app, ["registry", *map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a good and a bad run."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", b"good")
    write_run(tmp_path / "bad", b"bad", accuracy=0.5)
    return tmp_path


def test_registry_commands_from_registration_to_garbage_collection(place: Path) -> None:
    first = answer("register", "good", "--name", "reviews", "--note", "Monday's")
    assert (first["version"], first["new"], first["note"]) == (1, True, "Monday's")
    assert not answer("register", "good", "--name", "reviews")["new"]
    assert answer("promote", "reviews@1")["gate"] == {"against": None, "status": "not compared", "failed": []}
    answer("register", "bad", "--name", "reviews")
    refused = answer("promote", "reviews@2", code=1)
    assert refused["refused"] and refused["gate"]["status"] == "failed"
    assert {row["status"] for row in refused["judgements"] if row["metric"] == "accuracy"} == {"failed"}
    assert answer("aliases") == {"reviews": {"champion": 1}}
    forced = answer("promote", "reviews@2", "--force", "--why", "for a demonstration")
    assert not forced["refused"] and answer("aliases", "reviews") == {"reviews": {"champion": 2}}
    assert answer("rollback", "reviews", "--why", "it was only one")["version"] == 1
    assert [row["aliases"] for row in answer("list")] == [["champion"], []]
    shown = answer("show", "reviews@2")
    assert [entry["kind"] for entry in shown["history"]] == ["registered", "promoted"]
    assert shown["history"][1]["forced"] and shown["history"][1]["why"] == "for a demonstration"
    kinds = ["began", "registered", "promoted", "registered", "promoted", "rolled back"]
    assert [entry["kind"] for entry in answer("history")] == kinds
    assert answer("pull", "reviews@champion", "-o", "served")["version"] == 1
    assert (place / "served" / "model" / "onnx" / "model.onnx").read_bytes() == b"good"
    assert answer("push", "far")["entries"] == 6
    assert answer("fetch", "far", "--registry", "other")["entries"] == 6
    assert answer("verify", "--remote", "far") == {"sound": True, "faults": []}
    assert answer("retire", "reviews@2", "--why", "bad")["retired"]
    planned = answer("gc", "--dry-run")
    assert planned["versions"] == ["reviews@2"] and len(planned["objects"]) == 3
    assert answer("gc")["objects"] == planned["objects"]
    assert answer("verify") == {"sound": True, "faults": []}
    log = place / "artifacts" / "registry" / "log"
    log.write_bytes(log.read_bytes() + b"torn")
    assert [fault["path"] for fault in answer("verify", code=1)["faults"]] == ["log"]


def test_a_registry_imports_no_torch(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    Registry(root).register(write_run(tmp_path / "run", b"weights"), "reviews")
    code = """
from compress.cli import app
app(["registry", "promote", "reviews@1", "--registry", sys.argv[1]], standalone_mode=False)
assert "compress.plugins.registry.promotion" in sys.modules
"""
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "fsspec", "mlflow"}
    assert packages_imported_by(code, root).isdisjoint(heavy)
