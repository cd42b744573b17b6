"""Tests of model card, bill of materials and provenance, against their official readers; and of pushes to the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from license_expression import get_spdx_licensing
from ssh_keys import new_key
from toy_hub import TOKEN, Hub, serving
from toy_run import DIGESTS, write_run
from typer.testing import CliRunner

from compress.cli import app
from compress.pipeline.licences import find_licences, remarks_on
from compress.plugins.provenance.run_view import read_run
from compress.plugins.provenance.slsa import verify_statement
from compress.plugins.provenance.write import write_provenance
from compress.recipe.recipe import Recipe
from compress.results.report import load_report
from compress.utils.errors import BundleError, InputError, StageError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("papers")


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """Write a run with unsigned provenance files, which tests must not modify."""
    run_folder = write_run(home)
    write_provenance(read_run(run_folder), run_folder)
    return run_folder


def test_huggingface_hub_reads_the_model_card(run: Path) -> None:
    card = ModelCard.load(run / "README.md")
    card_fields = card.data.to_dict()
    assert str(card) == (run / "README.md").read_text()
    assert (card_fields["license"], card_fields["library_name"]) == ("cc-by-sa-4.0", "onnxruntime")
    accuracy, size = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.875)
    assert accuracy.task_type == card_fields["pipeline_tag"] == "text-classification"
    assert accuracy.metric_args == {"target": "cpu", "unit": "fraction", "low": 0.8, "high": 0.93, "n": 96}
    assert accuracy.dataset_args == {"sha256": DIGESTS["test"], "rows": 96}
    assert (size.metric_type, size.metric_value) == ("size_bytes", 12)
    validate_repo_id(accuracy.dataset_type)
    assert "- data train.csv: CC-BY-NC-4.0" in card.text
    assert "Data train.csv, CC-BY-NC-4.0: no commercial use." in card.text
    assert "contradict each other" in card.text


def test_bill_of_materials_is_valid_cyclonedx(run: Path) -> None:
    text = (run / "bom.cdx.json").read_text()
    checker = JsonStrictValidator(SchemaVersion.V1_6)
    assert checker.validate_str(text) is None
    broken = json.loads(text)
    broken["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] = 0.875
    assert checker.validate_str(json.dumps(broken)) is not None


def test_bill_of_materials_lists_parent_data_packages_and_metrics(run: Path) -> None:
    bill = json.loads((run / "bom.cdx.json").read_text())
    model = bill["metadata"]["component"]
    (parent,) = model["pedigree"]["ancestors"]
    assert (parent["name"], parent["licenses"]) == ("start", [{"expression": "CC-BY-SA-4.0"}])
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[0] == {
        "type": "accuracy (fraction)",
        "value": "0.875",
        "slice": "all rows, on cpu",
        "confidenceInterval": {"lowerBound": "0.8", "upperBound": "0.93"},
    }
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert parts["data:test"]["hashes"] == [{"alg": "SHA-256", "content": DIGESTS["test"]}]
    assert parts["data:train"]["licenses"] == [{"expression": "CC-BY-NC-4.0"}]
    assert "licenses" not in parts["data:test"]
    runtime = parts["pkg:pypi/onnxruntime@1.32.0"]
    assert (runtime["scope"], runtime["licenses"]) == ("required", [{"expression": "MIT"}])
    files = {part["name"]: part["hashes"][0]["content"] for part in model["components"]}
    assert files == {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}
    assert files.keys() == {"model/config.json", "model/onnx/model.onnx"}
    licensing = get_spdx_licensing()
    for part in (model, parent, *parts.values()):
        for licence in part.get("licenses", ()):
            names = licensing.license_keys(licence["expression"])
            assert all(name.startswith("LicenseRef-") or licensing.validate(name).errors == [] for name in names)


def test_provenance_is_a_valid_in_toto_statement(run: Path) -> None:
    statement: dict[str, Any] = json.loads((run / "provenance.json").read_text())
    parsed = statement_pb2.Statement()
    json_format.ParseDict(statement, parsed)  # refuses fields that in-toto does not know
    Statement.copy_from_pb(parsed).validate()
    provenance = provenance_pb2.Provenance()
    json_format.ParseDict(statement["predicate"], provenance)
    assert provenance.build_definition.build_type == "urn:compress:run:1"
    metadata = provenance.run_details.metadata
    assert metadata.finished_on.seconds - metadata.started_on.seconds == 61
    digests = [dict(part.digest) for part in provenance.build_definition.resolved_dependencies if part.digest]
    rows = [{"compressRowsSha256": digest} for digest in DIGESTS.values()]
    assert digests == [{"compressDirectorySha256": "3" * 64}, *rows]
    assert statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["model"] == "start"


def test_provenance_files_contain_no_local_paths(run: Path, home: Path) -> None:
    for name in ("README.md", "bom.cdx.json", "provenance.json"):
        assert str(home) not in (run / name).read_text() and "6.1.0-of-mine" not in (run / name).read_text()


def test_only_signatures_of_known_keys_are_accepted(tmp_path: Path) -> None:
    run, key = write_run(tmp_path / "home"), new_key(tmp_path / "keys")
    public = key.with_suffix(".pub")
    shell = CliRunner()
    done = shell.invoke(app, ["papers", str(run), "--sign", str(key), "--json"])
    assert done.exit_code == 0, done.output
    files = ["README.md", "bom.cdx.json", "provenance.json", "provenance.json.sig"]
    assert sorted(json.loads(done.stdout)["files"]) == files
    allowed = tmp_path / "allowed_signers"
    allowed.write_text(f'me@example.org namespaces="compress-provenance" {public.read_text()}')
    # Verification with OpenSSH, as recipients of the files would do it.
    command = ["ssh-keygen", "-Y", "verify", "-f", str(allowed), "-I", "me@example.org", "-n", "compress-provenance"]
    command += ["-s", str(run / "provenance.json.sig")]
    content = (run / "provenance.json").read_bytes()
    assert subprocess.run(command, input=content, capture_output=True, check=False).returncode == 0
    assert subprocess.run(command, input=content + b" ", capture_output=True, check=False).returncode != 0
    for known in (public, allowed):
        assert verify_statement(run, known).signer is not None
    for condition in ('namespaces="git"', 'valid-before="20200101"'):
        allowed.write_text(f"me@example.org {condition} {public.read_text()}")
        with pytest.raises(BundleError, match="Another key signed the provenance"):
            verify_statement(run, allowed)
    with pytest.raises(BundleError, match="whom nobody here knows") as caught:
        verify_statement(run, None)
    assert "--signer" in str(caught.value) and "ssh-keygen -l" in str(caught.value)
    other = new_key(tmp_path / "others").with_suffix(".pub")
    with pytest.raises(BundleError, match="Another key signed the provenance") as caught:
        verify_statement(run, other)
    assert "do not take the key from where these files came from" in str(caught.value)
    # Writing the files again without a key removes the outdated signature.
    write_provenance(read_run(run), run)
    assert verify_statement(run, None).signer is None
    with pytest.raises(BundleError, match="not signed"):
        verify_statement(run, public)


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_provenance(read_run(run), run)
    assert verify_statement(run, None).files == 2
    model = run / "model" / "onnx" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole.replace(b"g", b"G"))
    with pytest.raises(BundleError, match=r"model/onnx/model\.onnx was changed"):
        verify_statement(run, None)
    model.unlink()
    with pytest.raises(BundleError, match=r"model/onnx/model\.onnx is missing"):
        verify_statement(run, None)
    statement = json.loads((run / "provenance.json").read_text())
    statement["subject"][0]["name"] = "../../../../start/config.json"
    (run / "provenance.json").write_text(json.dumps(statement))
    with pytest.raises(BundleError, match="is missing"):
        verify_statement(run, None)
    (run / "provenance.json").write_text(json.dumps({**statement, "predicateType": "https://example.org/other"}))
    with pytest.raises(BundleError, match="predicateType"):
        verify_statement(run, None)


def test_incomplete_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(InputError, match=r"There is no provenance\.json"):
        verify_statement(run, None)
    (run / "lock.json").unlink()
    done = CliRunner().invoke(app, ["papers", str(run)])
    assert isinstance(done.exception, InputError) and "The run has no lock.json" in str(done.exception)


def test_run_writes_card_bill_of_materials_and_provenance(tiny_ran: Path) -> None:
    folder = next((tiny_ran / "artifacts" / "runs").glob("*/latest")).resolve()
    report = load_report(folder / "report.json")
    assert verify_statement(folder, None).files == sum(path.is_file() for path in (folder / "model").rglob("*"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / "bom.cdx.json").read_text()) is None
    card = ModelCard.load(folder / "README.md")
    accuracy = report.find("final", "accuracy", "cpu")
    assert accuracy is not None and card.data.license == "unknown"
    assert accuracy.value in [row.metric_value for row in card.data.eval_results if row.metric_type == "accuracy"]
    assert str(tiny_ran) not in card.content


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Redirect huggingface_hub to the fake Hub by its constants, which it has already set from the environment."""
    with serving(Hub()) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["push-to-hub", *map(str, arguments)])


def test_push_sends_the_files_of_the_dry_run(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run, key = write_run(tmp_path / "home"), new_key(tmp_path / "keys")
    write_provenance(read_run(run), run, key)
    dry = command(run, "me/toy", "--json")
    assert dry.exit_code == 0, dry.output
    answer = json.loads(dry.stdout)
    assert (hub.calls, answer["commit"], answer["private"]) == ([], None, True)
    shown = command(run, "me/toy")
    assert "nothing was sent" in shown.stdout and "license: cc-by-sa-4.0" in shown.stdout
    assert "contradict each other" in shown.stdout
    sent = command(run, "me/toy", "--push")
    assert sent.exit_code == 0, sent.output
    assert {name: len(content) for name, content in hub.repository.items()} == answer["files"]
    assert hub.repository["onnx/model.onnx"] == b"not a graph"
    assert (hub.created["organization"], hub.created["name"]) == ("me", "toy")
    assert hub.created["visibility"] == "private"
    # The fetched files can be verified.
    fetched = tmp_path / "fetched"
    for name, content in hub.repository.items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    assert verify_statement(fetched, key.with_suffix(".pub")).files == 2
    for text in (dry.output, shown.output, sent.output, caplog.text, *map(str, hub.repository.values())):
        assert TOKEN not in text


def test_error_of_the_hub_does_not_contain_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = command(write_run(tmp_path), "me/toy", "--push")
    assert isinstance(done.exception, StageError) and "403" in str(done.exception)
    assert TOKEN not in str(done.exception) and hub.repository == {}


@pytest.mark.parametrize(
    ("licence", "name", "message"),
    [("cc-by-nd-4.0", "me/toy", "permits no derivatives"), ("cc-by-sa-4.0", "me/toy/again", "OWNER/NAME")],
)
def test_invalid_push_is_refused_before_any_request(
    hub: Hub, tmp_path: Path, licence: str, name: str, message: str
) -> None:
    done = command(write_run(tmp_path, licence), name, "--push")
    assert isinstance(done.exception, InputError) and message in str(done.exception)
    assert hub.calls == []


def test_hub_model_card_is_requested_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub.repository["README.md"] = b"---\nlicense: llama2\n---\n"
    data = {"splits": {"test": "test.csv"}}
    fields = {"name": "toy", "task": "text-classification", "model": "me/base", "data": data, "stages": ["onnx"]}
    recipe = Recipe.model_validate(fields)
    licences_before = find_licences(recipe, tmp_path)
    assert (licences_before[0].licence, hub.calls) == ("not stated", [])
    assert [remark.split(";")[0] for remark in remarks_on(licences_before, recipe)] == [
        "no licence is stated for test data test.csv"
    ]
    fetched = find_licences(recipe, tmp_path, fetch=True)[0]
    assert (fetched.licence, fetched.stated_in) == ("LicenseRef-llama2", "README.md")
    # `compress check`, which makes no requests, uses the cached licence from now on.
    hub.calls.clear()
    assert (find_licences(recipe, tmp_path)[0], hub.calls) == (fetched, [])


def test_card_shows_no_control_characters(hub: Hub, tmp_path: Path) -> None:
    run = write_run(tmp_path / "home")
    write_provenance(read_run(run), run, None)
    with (run / "README.md").open("a") as card:
        card.write("a\x1b]0;title\x07b\x9b1A")
    shown = command(run, "me/toy").stdout
    assert "a\\x1b]0;title\\x07b\\x9b1A" in shown and not {"\x07", "\x9b", "\x1b"} & set(shown)
