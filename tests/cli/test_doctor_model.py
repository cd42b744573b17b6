"""`compress doctor MODEL`: what it says of kernels and of saturation, with a recipe's real inputs and without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from compress.cli.doctor import doctor
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.utils.errors import InputError

INNER = 64


def save(folder: Path, kept: tuple[str, ...] = (), reduce_range: bool = False) -> Path:
    """Two products whose weights are all positive, so that neighbours add up."""
    generator = np.random.default_rng(0)
    arrays = [generator.uniform(0, 1, (INNER, INNER)).astype(np.float32) for _ in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["y"], name="one"),
        helper.make_node("MatMul", ["y", "second"], ["z"], name="two"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", INNER]) for name in ("x", "z")]
    named = [numpy_helper.from_array(array, name) for array, name in zip(arrays, ("first", "second"), strict=True)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], named)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feeds = [{"x": generator.uniform(0, 1, (8, INNER)).astype(np.float32)}]
    settings = Int8Options(reduce_range=reduce_range, bias_correction=False)
    onnx.save(StaticQuantizer(model, feeds, settings).quantize(kept), folder / "model.onnx")
    return folder


def diagnose(*options: str) -> list[tuple[str, str, str | None]]:
    app = typer.Typer()
    app.command()(doctor)
    answer = CliRunner().invoke(app, [*options, "--json"])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return [(finding["level"], finding["what"], finding["advice"]) for finding in json.loads(answer.stdout)["findings"]]


def test_a_processor_without_vnni_is_warned_of(tmp_path: Path):
    findings = diagnose(str(save(tmp_path)), "--target", "x86-avx2")
    assert findings[0] == ("ok", "2 of 2 operators with weights run as 8-bit integer kernels", None)
    warnings = [(what, advice) for level, what, advice in findings if level == "warning"]
    assert len(warnings) == 3 and "one saturates" in warnings[0][0] + warnings[1][0]
    assert "2 of 2 products" in warnings[2][0] and "reduce_range: auto" in (warnings[2][1] or "")


@pytest.mark.parametrize(("target", "reduce_range"), [("x86-avx2", True), ("x86-vnni", False), ("arm64", False)])
def test_where_nothing_saturates_all_is_well(target: str, reduce_range: bool, tmp_path: Path):
    findings = diagnose(str(save(tmp_path, reduce_range=reduce_range)), "--target", target)
    assert [level for level, _, _ in findings] == ["ok", "ok"] and findings[1][1].startswith(target)


def test_what_is_not_an_integer_kernel_is_named_with_what_helps(tmp_path: Path):
    findings = diagnose(str(save(tmp_path, kept=("two",))), "--target", "x86-vnni")
    assert findings[0][1].startswith("1 of 2")
    level, what, advice = findings[1]
    assert level == "warning" and what.startswith("1 MatMul in float (two): it is not quantized")
    assert advice is not None and "accuracy floor" in advice


def test_options_that_mean_nothing_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="--target has no effect without a model"):
        diagnose("--target", "x86-avx2")
    with pytest.raises(InputError, match="--against has no effect without a model"):
        diagnose("--against", "float.onnx")
    with pytest.raises(InputError, match="--against is timed on this machine"):
        diagnose(str(save(tmp_path)), "--target", "x86-avx2", "--against", str(tmp_path))
    with pytest.raises(InputError, match="are not available on the target 'llama-cpp'"):
        diagnose(str(tmp_path), "--target", "llama-cpp")
    with pytest.raises(InputError, match="on the target 'coreml': a package runs on a Mac only"):
        diagnose(str(tmp_path), "--target", "coreml")
    with pytest.raises(InputError, match="no processor 'pentium'"):
        diagnose(str(tmp_path), "--target", "pentium")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds 0 \.onnx files"):
        diagnose(str(tmp_path), "--against", str(tmp_path / "empty"))
