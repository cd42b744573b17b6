"""Suites: what they may say, every problem at once, and the schema that editors read."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from compress.plugins.nightly.suite import read_suite, select_entries, suite_schema
from compress.utils.errors import InputError

ROOT = Path(__file__).parents[3]
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    (folder / "a.yaml").write_text("name: a\n")
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
name: night
budget_minutes: 90
history: history.sqlite
baselines: baselines
policy: {rules: [{metric: latency_ms, worse_by: 7%}]}
entries:
  - recipe: a.yaml
  - {recipe: a.yaml, name: b, set: [seed=1], targets: [cpu], time_limit_minutes: 5,
     policy: {rules: [{metric: accuracy, worse_by: 1 points}]}}
""",
    )
    suite = read_suite(path)
    first, second = suite.entries
    assert (suite.name, suite.budget_minutes, suite.history) == ("night", 90, "history.sqlite")
    assert suite.policy.rules[0].margin == (0.07, True)
    assert (first.label, first.overrides, first.policy, first.time_limit_minutes) == ("a", (), None, None)
    assert (second.label, second.overrides, second.time_limit_minutes) == ("b", ("seed=1", "targets=[cpu]"), 5)
    assert second.policy is not None
    assert second.policy.rules[0].margin == (0.01, False)
    assert select_entries(suite, ["b"]).entries == (second,)
    with pytest.raises(InputError, match="no entry 'c'"):
        select_entries(suite, ["c"])


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """name: a night
budget_minutes: 0
baseline: folder
entries:
  - recipe: b.yaml
  - recipe: a.yaml
  - {recipe: a.yaml, targets: [cpus], time_limit_minutes: -1}
policy: {rules: [{metric: latency_ms, worse_by: much}]}
""",
    )
    with pytest.raises(InputError) as refused:
        read_suite(path)
    text = str(refused.value)
    assert "The suite has 8 problems" in text
    lines = [(f"{path}:{line}: {field}", word) for line, field, word in (
        (1, "name", "form"), (2, "budget_minutes", "above 0"), (3, "baseline", "'baselines'"),
        (5, "entries.0.recipe", "'b.yaml', where no file lies"), (7, "entries.2.recipe", "a second entry 'a'"),
        (7, "entries.2.targets.0", "'cpu'"), (7, "entries.2.time_limit_minutes", "above 0"),
        (8, "policy.rules.0.worse_by", "a margin"),
    )]  # fmt: skip
    for start, word in lines:
        (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
        assert word in line
    assert "recipe has" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty file"),
        ("- a\n", "a list of 1"),
        ("name: [", "invalid YAML"),
        ("name: x\nentries: []\n", "at least 1"),
        ("name: x\n", "entries: found nothing"),
        ("name: x\nentries: [a.yaml]\n", "a mapping of fields"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_suite(write(tmp_path, text))
    assert said in str(refused.value)
    assert "The suite has" in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_missing_suite_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "name: x\n")
    with pytest.raises(InputError, match=r"Did you mean 'suite\.yaml'"):
        read_suite(tmp_path / "siute.yaml")


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_of_the_tree_are_valid(path: Path) -> None:
    assert read_suite(path).name == path.stem
    jsonschema.validate(yaml.safe_load(path.read_text()), suite_schema())


def test_the_published_schema_is_current_and_refuses_what_the_reader_refuses() -> None:
    assert json.loads((ROOT / "docs" / "suite.schema.json").read_text()) == suite_schema(), "run `make docs`"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "entries": [{"recipe": "a", "target": "cpu"}]}, suite_schema())


def test_there_are_suites_and_a_workflow_that_runs_them() -> None:
    assert "own" in {path.stem for path in SUITES}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    steps = workflow["jobs"]["nightly"]["steps"]
    (night,) = [step for step in steps if "compress nightly" in step.get("run", "")]
    named = night["run"].split()[-1]
    assert (ROOT / named).is_file()
    assert "continue-on-error" not in night
    assert any("upload-artifact" in step.get("uses", "") and step.get("if") == "always()" for step in steps)
