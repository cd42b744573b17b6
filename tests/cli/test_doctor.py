"""Tests of `compress doctor`: findings on the machine, on a model of one graph, and on an encoder-decoder."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import invoke
from onnx import helper
from onnx_graphs import onnx_model
from stage_context import write_recipe
from tiny_speech import TASK, write_speech

from compress.formats import runtime
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import quantized_name
from compress.formats.registry import RUNTIMES
from compress.models.checkpoint import Checkpoint
from compress.utils import environment
from compress.utils.environment import RequiredPackage
from compress.utils.errors import InputError

Usage = namedtuple("Usage", "total used free")


def diagnose(*options: str) -> tuple[int, str]:
    result = invoke("doctor", *options)
    return result.exit_code, result.stdout


def findings(level: str) -> dict[str, str | None]:
    _, text = diagnose("--json")
    return {f["what"]: f["advice"] for f in json.loads(text)["findings"] if f["level"] == level}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Simulate a machine without problems and return its description, which a test may change."""
    described: dict[str, Any] = {
        **environment.environment(),
        "features": ["avx2", "avx512_vnni"],
        "cores_granted": 4,
        "cores_quota": None,
        "governor": "performance",
        "memory_bytes": 16_000_000_000,
        "memory_limit_bytes": None,
    }
    monkeypatch.setattr(environment, "environment", lambda: described)
    monkeypatch.setattr(environment, "features", lambda: tuple(described["features"]))
    monkeypatch.setattr(environment, "is_installed", lambda: True)
    monkeypatch.setattr(environment, "packages", lambda: [RequiredPackage("numpy", ">=2", "2.4.6")])
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**12))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    monkeypatch.chdir(tmp_path)
    return described


def test_absent_options_are_marked_and_the_last_line_counts_all(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [RequiredPackage("numpy", ">=2", "2.4.6"), RequiredPackage("nothing", ">=1", None, "rare")]
    monkeypatch.setattr(environment, "packages", lambda: packages)
    code, text = diagnose("-v")
    lines, brief = text.splitlines(), diagnose()[1].splitlines()
    # What is absent takes one line, whose reasons and remedies -v shows.
    (absent,) = (line for line in brief if line.startswith("- "))
    assert "extra rare" in absent and "not installed" not in absent and len(brief) < len(lines)
    assert code == 0 and "-        extra rare: not installed (lacks nothing)" in lines
    counts = {mark: sum(line.startswith(mark) for line in lines) for mark in ("ok ", "- ", "warning ")}
    warnings = f", {counts['warning ']} warning{'s' * (counts['warning '] > 1)}" if counts["warning "] else ""
    expected = f"{counts['ok ']} ok, {counts['- ']} optional parts absent (-){warnings}"
    assert brief[-1] == lines[-1] == f"{expected}: nothing has to be fixed before a run"


def test_machine_without_problems_passes(machine: dict[str, Any]) -> None:
    assert diagnose("--json")[0] == 0
    assert findings("warning") == {}
    assert findings("problem") == {}


def test_wrong_package_fails_with_pip_command(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [RequiredPackage("torch", ">=2.13", "2.1.0"), RequiredPackage("onnx", ">=1.23", None)]
    monkeypatch.setattr(environment, "packages", lambda: wrong)
    assert findings("problem") == {
        "torch >=2.13 is needed, 2.1.0 is installed": "pip install 'torch>=2.13'",
        "onnx >=1.23 is needed, it is missing": "pip install 'onnx>=1.23'",
    }
    code, text = diagnose()
    assert code == 1
    assert "PROBLEM  torch >=2.13 is needed, 2.1.0 is installed\n" in text
    assert "-> pip install 'torch>=2.13'\n" in text


def test_missing_extra_is_no_problem(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "packages", lambda: [RequiredPackage("tensorrt", "", None, "gpu")])
    assert diagnose()[0] == 0
    assert findings("absent")["extra gpu: not installed (lacks tensorrt)"] == "pip install 'compress-models[gpu]'"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": ["avx2"]}, "lacks VNNI"),
        ({"cores_quota": 1.5}, "CPU time to 1.5 cores"),
        ({"governor": "powersave"}, "'powersave'"),
        ({"memory_limit_bytes": 2_000_000_000}, "2.0 GB of memory is little"),
    ],
)
def test_unsuitable_machine_settings_are_warned_of(machine: dict[str, Any], change: dict[str, Any], words: str) -> None:
    machine.update(change)
    (what,) = findings("warning")
    assert words in what
    assert diagnose()[0] == 0


def test_load_and_disk_are_warned_of(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (4.5, 1.0, 1.0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**9))
    assert list(findings("warning")) == [
        "the load is 4.5 on 4 cores",
        "1.0 GB free on the disk of the current folder, which is little",
    ]


def test_missing_runtime_is_a_problem(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(RUNTIMES["onnxruntime"], runtime="compress.formats.no_such_module:RUNTIME")
    monkeypatch.setattr(runtime, "RUNTIMES", {**RUNTIMES, "onnxruntime": lacking})
    (what,) = findings("problem")
    assert what.startswith("target cpu: the runtime 'onnxruntime' cannot be imported")


INNER = 64


def save(folder: Path, kept: tuple[str, ...] = (), reduce_range: bool = False) -> Path:
    """Save two quantized MatMuls with [64, 64] positive weights, so that pairs of products can saturate 16 bits."""
    generator = np.random.default_rng(0)
    arrays = {name: generator.uniform(0, 1, (INNER, INNER)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["y"], name="one"),
        helper.make_node("MatMul", ["y", "second"], ["z"], name="two"),
    ]
    model = onnx_model(nodes, {"x": ["rows", INNER]}, {"z": ["rows", INNER]}, arrays)
    feeds = [{"x": generator.uniform(0, 1, (8, INNER)).astype(np.float32)}]
    settings = Int8Options(reduce_range=reduce_range, bias_correction=False)
    onnx.save(StaticQuantizer(model, feeds, settings).quantize(kept), folder / "model.onnx")
    return folder


def model_findings(*options: str) -> list[tuple[str, str, str | None]]:
    findings = diagnose_as_json(*options)["findings"]
    return [(finding["level"], finding["what"], finding["advice"]) for finding in findings]


@pytest.mark.parametrize(
    ("operator", "shape", "stage"),
    [("Conv", (32, INNER, 3), "onnx_int8: {method: static}"), ("MatMul", (INNER, INNER), "onnx_int8")],
)
def test_float_model_gets_a_stage_that_quantizes_its_operators(
    tmp_path: Path, operator: str, shape: tuple[int, ...], stage: str
):
    node = helper.make_node(operator, ["x", "weight"], ["y"])
    weights = {"weight": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    onnx.save(onnx_model([node], {"x": [1, INNER, INNER]}, {"y": None}, weights), tmp_path / "model.onnx")
    advice = f"the stage `{stage}` makes it smaller"
    assert model_findings(str(tmp_path))[0] == ("ok", "no operator of the model runs on 8-bit integers", advice)


def test_saturation_without_vnni_is_warned_of(tmp_path: Path):
    findings = model_findings(str(save(tmp_path)), "--target", "x86-avx2")
    assert findings[0] == ("ok", "2 of 2 operators with weights run as 8-bit integer kernels", None)
    warnings = [(what, advice) for level, what, advice in findings if level == "warning"]
    assert len(warnings) == 3 and "one saturates" in warnings[0][0] + warnings[1][0]
    assert "2 of 2 products" in warnings[2][0] and "reduce_range: auto" in (warnings[2][1] or "")


@pytest.mark.parametrize(("target", "reduce_range"), [("x86-avx2", True), ("x86-vnni", False), ("arm64", False)])
def test_no_warning_where_nothing_saturates(target: str, reduce_range: bool, tmp_path: Path):
    findings = model_findings(str(save(tmp_path, reduce_range=reduce_range)), "--target", target)
    assert [level for level, _, _ in findings] == ["ok", "ok"] and findings[1][1].startswith(target)


def test_float_operator_is_named_with_advice(tmp_path: Path):
    findings = model_findings(str(save(tmp_path, kept=("two",))), "--target", "x86-vnni")
    assert findings[0][1].startswith("1 of 2")
    level, what, advice = findings[1]
    assert level == "warning" and what.startswith("1 MatMul in float (two): it is not quantized")
    assert advice is not None and "accuracy floor" in advice


def test_options_without_effect_are_rejected(tmp_path: Path):
    with pytest.raises(InputError, match="--target has no effect without a model"):
        model_findings("--target", "x86-avx2")
    with pytest.raises(InputError, match="--against has no effect without a model"):
        model_findings("--against", "float.onnx")
    with pytest.raises(InputError, match="--against has no effect without a target of another format"):
        model_findings(str(save(tmp_path)), "--target", "x86-avx2", "--against", str(tmp_path))
    with pytest.raises(InputError, match="are not available on the target 'llama-cpp'"):
        model_findings(str(tmp_path), "--target", "llama-cpp")
    with pytest.raises(InputError, match="on the target 'coreml'"):
        model_findings(str(tmp_path), "--target", "coreml")
    with pytest.raises(InputError, match="no processor 'pentium'"):
        model_findings(str(tmp_path), "--target", "pentium")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds 0 \.onnx files"):
        model_findings(str(tmp_path / "empty"))


ENCODER, DECODER = "encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a speech model in `float/` and `int8/`, a recipe and its recordings."""
    folder = tmp_path_factory.mktemp("place")
    write_recipe(folder, TASK, write_speech(folder), ["onnx"], benchmark={"threads": 1})
    floats = export_encoder_decoder(Checkpoint(folder / "model"))
    graphs = {
        quantized_name(name): quantize_products(graph, per_channel=True, reduce_range=False)
        for name, graph in floats.graphs.items()
    }
    for name, model in {"float": floats, "int8": floats.with_graphs(graphs)}.items():
        (folder / name).mkdir()
        model.save(folder / name)
    return folder


def diagnose_as_json(*options: str) -> dict[str, Any]:
    diagnosis: dict[str, Any] = json.loads(diagnose(*options, "--json")[1])
    return diagnosis


def test_operators_in_if_branches_are_counted(speech_folder: Path) -> None:
    """Each of 2 encoder layers has 6 MatMuls, each of 2 decoder layers 10 (2 in an If branch); the head is one more."""
    messages = [
        finding["what"] for finding in diagnose_as_json(str(speech_folder / "int8"), "--target", "x86-vnni")["findings"]
    ]
    assert f"{ENCODER}: 12 of 14 operators with weights run as 8-bit integer kernels" in messages
    assert f"{DECODER}: 20 of 21 operators with weights run as 8-bit integer kernels" in messages


def test_saturation_is_checked_in_encoder_and_decoder(speech_folder: Path) -> None:
    """Without a recipe, saturation is bounded from the weights; with one, it is counted on real inputs."""
    blind = diagnose_as_json(str(speech_folder / "int8"), "--target", "x86-avx2")["findings"]
    assert [finding for finding in blind if "name a recipe" in finding["what"]]
    assert [
        finding
        for finding in blind
        if finding["what"].startswith(f"{DECODER}: ") and "of 20 products" in finding["what"]
    ]
    findings = diagnose_as_json(
        str(speech_folder / "int8"), "--recipe", str(speech_folder / "tiny.yaml"), "--target", "x86-avx2"
    )["findings"]
    messages = [finding["what"] for finding in findings if "saturat" in finding["what"]]
    assert {message.partition(":")[0] for message in messages} == {ENCODER, DECODER}
    assert not [message for message in messages if "name a recipe" in message]
    assert [message for message in messages if message.startswith(f"{DECODER}: ") and "on real inputs" in message]
