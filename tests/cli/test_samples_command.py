"""Tests of `compress samples`: the list of samples, and fetching and verifying them."""

import json
import re

import pytest
from typer.testing import CliRunner

from compress.cli.samples import samples_app
from compress.data.samples.fetch import entry_name
from compress.data.samples.sample import find_sample, known_samples
from compress.utils.errors import SampleError

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "compress" / "samples"


def write_cache_entry(cache, name, content="x") -> str:
    """Write a cache entry as `fetch` does, with one small file, and return the folder of its files."""
    home = cache / entry_name(find_sample(name))
    (home / "files").mkdir(parents=True)
    (home / "files" / "a.txt").write_text(content)
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # SHA-256 of the letter x
    (home / "manifest.json").write_text(json.dumps({"files": {"a.txt": {"size_bytes": 1, "sha256": sha256}}}))
    return str(home / "files")


@pytest.mark.parametrize("command", [["list", "--json"], ["--json"]])
def test_json_list_has_folders_of_fetched_samples(cache, command):
    folder = write_cache_entry(cache, "snippets")
    result = runner.invoke(samples_app, command)
    assert result.exit_code == 0
    folders = {row["name"]: row["folder"] for row in json.loads(result.stdout)}
    assert folders == {**dict.fromkeys(known_samples()), "snippets": folder}


@pytest.mark.parametrize("command", [["list"], []])
def test_list_shows_licence_and_size(command):
    result = runner.invoke(samples_app, command)
    assert re.search(r"sample:minilm +\(model, 83\.5 MB, not fetched\)", result.stdout)
    assert "Apache-2.0" in result.stdout
    assert "vaderSentiment==0.5" in result.stdout


def test_fetch_prints_folder_of_cached_sample(cache):
    folder = write_cache_entry(cache, "snippets")
    result = runner.invoke(samples_app, ["fetch", "snippets", "--json"])
    assert json.loads(result.stdout) == {"snippets": folder}
    assert runner.invoke(samples_app, ["fetch", "sample:snippets"]).stdout == f"sample:snippets\t{folder}\n"


def test_verify_detects_changed_content_of_equal_size(cache, monkeypatch):
    write_cache_entry(cache, "snippets", "y")
    assert runner.invoke(samples_app, ["fetch", "snippets"]).exit_code == 0
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    result = runner.invoke(samples_app, ["fetch", "snippets", "--verify"])
    assert isinstance(result.exception, SampleError)
    assert "cannot be fetched" in str(result.exception)
    assert "a.txt has another SHA-256" in result.stderr


def test_misspelt_name_fetches_nothing(cache):
    result = runner.invoke(samples_app, ["fetch", "snippets", "movie-review"])
    assert isinstance(result.exception, SampleError)
    assert "Did you mean 'movie-reviews'" in str(result.exception)
    assert not cache.exists()
