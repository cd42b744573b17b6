"""Tests of differences between machines and of the policies of gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from comparisons import MACHINE

from compress.recipe.loading import dump_recipe
from compress.recipe.policy import Margin, Policy, Rule, parse_margin
from compress.report.compare.gate import read_policy
from compress.report.compare.machine_match import fingerprint, machine_differences, machine_summary
from compress.utils.errors import InputError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processor": "other"}, "processor: an invented processor and other"),
        ({"features": ["avx2", "avx512_vnni"]}, "processor features: avx2 and avx2, avx512_vnni"),
        ({"cores_granted": 2}, "cores granted: 4 and 2"),
        ({"cores_quota": 1.5}, "quota of cores: none and 1.50"),
        ({"governor": "powersave"}, "frequency governor: none and powersave"),
        ({"memory_bytes": 32_000_000_000}, "memory: 16.0 GB and 32.0 GB"),
        ({"memory_limit_bytes": 2_000_000_000}, "memory limit: none and 2.00 GB"),
        ({"threads": 1}, "threads of the runtime: 2 and 1"),
        (
            {"runtime_settings": {"final": {"provider": "CUDAExecutionProvider"}}},
            "execution provider: CPUExecutionProvider and CUDAExecutionProvider",
        ),
    ],
)
def test_each_difference_of_machines_is_named(changes: dict[str, Any], words: str) -> None:
    assert machine_differences(MACHINE, {**MACHINE, **changes}) == ((words,), ())


def test_same_machine_has_no_differences() -> None:
    machine = {**MACHINE, "features": ["avx2", "avx512f"]}
    reordered = {**machine, "features": ["avx512f", "avx2"], "memory_bytes": 16_000_100_000, "load": 3}
    assert machine_differences(machine, reordered) == ((), ())


def test_software_differences_are_separate_from_machine() -> None:
    other = {**MACHINE, "python": "3.12.1", "packages": {"onnxruntime": "1.33.0", "nncf": "3.4.0"}}
    machine, software = machine_differences(MACHINE, other)
    assert machine == ()
    assert software == (
        "Python: 3.11.7 and 3.12.1", "nncf: not installed and 3.4.0", "onnxruntime: 1.32.0 and 1.33.0",
    )  # fmt: skip


def test_unknown_machine_is_a_difference_but_missing_key_is_not() -> None:
    assert machine_differences({}, MACHINE).machine == ("the baseline does not say which machine it was measured on",)
    older = {key: value for key, value in MACHINE.items() if key != "governor"}
    assert machine_differences(older, {**MACHINE, "governor": "performance"}) == ((), ())


def test_fingerprint_is_idempotent() -> None:
    once = fingerprint(MACHINE)
    assert once["provider"] == "CPUExecutionProvider"
    assert "runtime_settings" not in once
    assert fingerprint(once) == once
    assert machine_summary(once) == "an invented processor, 4 of 4 cores, 16.0 GB, Linux x86_64"


@pytest.mark.parametrize(
    ("written", "value", "relative"),
    [("5%", 0.05, True), ("0.5 points", 0.005, False), ("1 point", 0.01, False), (" .5points ", 0.005, False),
     (0.005, 0.005, False), (2, 2.0, False), ("0%", 0.0, True)],
)  # fmt: skip
def test_margins_are_parsed(written: str | float, value: float, relative: bool) -> None:
    assert parse_margin(written) == (pytest.approx(value), relative)


@pytest.mark.parametrize("written", ["5", "-5%", "5 pints", "", "5%%", -0.1, float("inf"), "nan%", True, [5], None])
def test_invalid_margins_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"a margin: `5%`"):
        Rule.model_validate({"metric": "accuracy", "worse_by": written})


def test_margins_convert_between_scales() -> None:
    assert Margin(0.05, relative=True).of(0.8, relative=False) == pytest.approx(0.04)
    assert Margin(0.5, relative=False).of(10.0, relative=True) == pytest.approx(0.05)
    assert Margin(0.5, relative=False).of(0.0, relative=True) is None


def test_exact_rule_precedes_patterns_and_first_pattern_wins() -> None:
    rules = [("latency_*", "1%"), ("latency_ms*", "2%"), ("latency_ms", "3%")]
    policy = Policy(rules=tuple(Rule(metric=metric, worse_by=worse_by) for metric, worse_by in rules))
    rules_by_metric = {name: policy.rule(name) for name in ("latency_ms", "latency_ms_batch_32", "accuracy")}
    assert {name: rule and rule.worse_by for name, rule in rules_by_metric.items()} == {
        "latency_ms": "3%", "latency_ms_batch_32": "1%", "accuracy": None,
    }  # fmt: skip


def test_slice_rule_does_not_apply_to_the_whole() -> None:
    policy = Policy(rules=(Rule(metric="accuracy", worse_by="2 points", slices="worst"),))
    assert policy.rule("accuracy") is None
    assert policy.slice_rule("accuracy") is not None


def test_every_problem_of_a_policy_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "rules:\n- {metric: accuracy, worse_by: 5 pints}\n- {metric: loss, worse_by: 1%, cannot_tel: pass}\n"
        "- {worse_by: 1%}\ncannot_tell: maybe\nsession_spread: -1\n"
    )
    with pytest.raises(InputError) as caught:
        read_policy(path)
    text = str(caught.value)
    assert text.startswith("The policy has 5 problems:")
    for words in (
        "policy.yaml:2: rules.0.worse_by: found '5 pints'",
        "policy.yaml:3: rules.1.cannot_tel: found an unknown field",
        "Did you mean 'cannot_tell'?",
        "policy.yaml:4: rules.2.metric: found nothing",
        "policy.yaml:5: cannot_tell: found 'maybe'",
        "policy.yaml:6: session_spread: found -1",
    ):
        assert words in text


def test_recipe_can_contain_a_policy(tmp_path: Path) -> None:
    gate = {"rules": [{"metric": "accuracy", "worse_by": "1 point"}], "cannot_tell": "fail"}
    path = tiny_run.write_recipe(tmp_path, gate=gate)
    recipe = tiny_run.load(path)
    assert recipe.gate == read_policy(path)
    assert recipe.gate is not None
    assert (recipe.gate.rules[0].margin, recipe.gate.cannot_tell) == ((0.01, False), "fail")
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert tiny_run.load(again).gate == recipe.gate
    assert yaml.safe_load(again.read_text())["gate"]["rules"][0]["worse_by"] == "1 point"
    assert tiny_run.load(tiny_run.write_recipe(tmp_path, "plain")).gate is None
