"""Tests of `compress targets`: the built-in targets, and targets from a file."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
from command_line import output_of

from compress.formats.targets import TARGETS
from compress.recipe.target_entries import read_target_file
from compress.utils.errors import InputError


def test_unavailable_targets_have_a_reason() -> None:
    rows = json.loads(output_of("targets", "--json"))
    assert [row["name"] for row in rows] == list(TARGETS)
    assert all(row["available"] == (row["reason"] is None) for row in rows)
    for row in rows:
        if row["runtime"] == "onnxruntime" and row["provider"] not in onnxruntime.get_available_providers():
            assert f"has no {row['provider']}" in row["reason"]
    cpu = {"name": "cpu", "runtime": "onnxruntime", "provider": "CPUExecutionProvider", "formats": ["onnx"]}
    assert rows[0].items() >= {**cpu, "threads": None, "device": None, "options": {}, "available": True}.items()


def test_target_file_is_validated_and_listed_alone(tmp_path: Path) -> None:
    file = tmp_path / "pi.yaml"
    file.write_text("name: pi\nformat: openvino\nthreads: 4\nmax_bytes: 9000000\nembedding_bits: 4\n")
    (row,) = json.loads(output_of("targets", file, "--json"))
    assert (row["name"], row["runtime"], row["threads"], row["max_bytes"]) == ("pi", "openvino", 4, 9_000_000)
    assert (row["formats"], row["options"], row["measured_instead_of"]) == (["openvino"], {"embedding_bits": 4}, "pi")
    file.write_text("name: pi\nformat: openvino\nembedding_bits: 5\n")
    with pytest.raises(InputError, match=r"The target has 1 problem:\n.*pi\.yaml:3: embedding_bits: found 5"):
        read_target_file(file)


def test_phone_target_names_runtime_measured_instead() -> None:
    rows = {row["name"]: row for row in json.loads(output_of("targets", "--json"))}
    android = rows["android"]
    assert (android["runtime"], android["formats"]) == ("onnxruntime", ["onnx", "ort", "litert", "executorch"])
    assert android["apps"]["ort"] == "Maven: com.microsoft.onnxruntime:onnxruntime-android"
    assert android["measured_instead_of"] == "an Android phone" and rows["desktop"]["measured_instead_of"] is None


def test_target_is_listed_by_name() -> None:
    (row,) = json.loads(output_of("targets", "ios", "--json"))
    assert (row["name"], row["measured_instead_of"]) == ("ios", "an iPhone")


@pytest.mark.parametrize(
    ("name", "suggestion"), [("iphone", "ios"), ("andriod", "android"), ("raspberry-7", None), ("openvno", "openvino")]
)
def test_unknown_target_lists_all_and_suggests_one(name: str, suggestion: str | None) -> None:
    with pytest.raises(InputError) as error:
        output_of("targets", name)
    assert error.value.expected == f"one of {', '.join(TARGETS)}"
    assert error.value.hint == (suggestion and f"did you mean {suggestion!r}?")


@pytest.mark.parametrize("name", ["iphone", "cpu"])
def test_targets_of_bundles_are_listed_at_once(name: str) -> None:
    with pytest.raises(InputError) as error:
        output_of("bundle", "nothing", "--target", name, "--output", "app")
    assert error.value.expected == "one of browser, android, ios, linux-arm64, desktop"
