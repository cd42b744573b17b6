"""What goes to the Hub is what the dry run shows, when it is asked for, and nobody reads the token."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import constants
from toy_hub import TOKEN, Hub, serving
from toy_run import new_key, write_run
from typer.testing import CliRunner

from compress.cli import app
from compress.pipeline.licences import find_licences, objections
from compress.plugins.provenance.run_view import read_run
from compress.plugins.provenance.slsa import verify_statement
from compress.plugins.provenance.write import write_provenance
from compress.recipe.recipe import Recipe
from compress.utils.errors import InputError, StageError

# The Hub's library hands a file to its HTTP client in the way of an older one.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """As HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET would have it, which the library has read already."""
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


def test_a_push_sends_what_the_dry_run_shows(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    # Whoever fetches it proves what they got.
    fetched = tmp_path / "fetched"
    for name, content in hub.repository.items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    assert verify_statement(fetched, key.with_suffix(".pub")).files == 2
    for text in (dry.output, shown.output, sent.output, caplog.text, *map(str, hub.repository.values())):
        assert TOKEN not in text


def test_a_refusal_of_the_hub_says_no_token(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = command(write_run(tmp_path), "me/toy", "--push")
    assert isinstance(done.exception, StageError) and "403" in str(done.exception)
    assert TOKEN not in str(done.exception) and hub.repository == {}


def test_a_model_that_may_not_be_passed_on_stays_here(hub: Hub, tmp_path: Path) -> None:
    done = command(write_run(tmp_path, "cc-by-nd-4.0"), "me/toy", "--push")
    assert isinstance(done.exception, InputError) and "permits no derivatives" in str(done.exception)
    assert hub.calls == []


def test_a_card_of_the_hub_is_asked_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hub.repository["README.md"] = b"---\nlicense: llama2\n---\n"
    recipe = Recipe.model_validate(
        {
            "name": "toy",
            "task": "text-classification",
            "model": "me/base",
            "data": {"splits": {"test": "test.csv"}},
            "stages": ["onnx"],
        }
    )
    licences_before = find_licences(recipe, tmp_path)
    assert (licences_before[0].licence, hub.calls) == ("not stated", [])
    assert [objection.words.split(";")[0] for objection in objections(licences_before, recipe)] == [
        "no licence is stated of test data test.csv"
    ]
    fetched = find_licences(recipe, tmp_path, fetch=True)[0]
    assert (fetched.licence, fetched.stated_in) == ("LicenseRef-llama2", "README.md")
    # `compress check`, which fetches nothing, knows it from then on.
    hub.calls.clear()
    assert (find_licences(recipe, tmp_path)[0], hub.calls) == (fetched, [])


def test_a_name_that_the_hub_does_not_take(hub: Hub, tmp_path: Path) -> None:
    done = command(write_run(tmp_path), "me/toy/again", "--push")
    assert isinstance(done.exception, InputError) and "OWNER/NAME" in str(done.exception)
    assert hub.calls == []
