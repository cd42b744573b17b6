"""Tests of layer comparison: faults injected into a file of each format are located, and correct files have none."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model

from compress.formats.onnx.int8.dynamic import DynamicQuantizer
from compress.formats.ort.model import ort_tools, read_ort
from compress.formats.ort.stage import convert
from compress.formats.runtime import prepare_runtime
from compress.formats.targets import TARGETS
from compress.inspection.layer_comparison import FormatComparison, Gap, compare_parts, open_value_graph
from compress.inspection.layers import node_modules
from compress.numerics.block_quantization import on_coarse_grid
from compress.utils.progress import SilentProgress

LAYERS, WIDTH, WORDS = 4, 64, 50
EPSILON = float(np.float32(1e-5))
BATCHES = [{"input_ids": np.random.default_rng(seed).integers(0, WORDS, (1, 5 + seed))} for seed in range(4)]
EIGHT_BITS = ("dynamic", "dynamic-ort")
FORMATS = ("onnx", "ort", *EIGHT_BITS)


def encoder() -> onnx.ModelProto:
    """Return input_ids [n, length] -> logits: a table and layers of MatMul, bias, Tanh, residual and layer norm."""
    generator = np.random.default_rng(0)
    stored = {
        "embeddings.weight": generator.normal(size=(WORDS, WIDTH)),
        "head.weight": generator.normal(size=(WIDTH, 2)),
    }
    nodes = [helper.make_node("Gather", ["embeddings.weight", "input_ids"], ["hidden_0"], "node_embedding")]
    for layer in range(LAYERS):
        dense, norm = f"encoder.layer.{layer}.dense", f"encoder.layer.{layer}.norm"
        stored[f"{dense}.weight"] = generator.normal(size=(WIDTH, WIDTH)) / 8
        stored[f"{dense}.bias"] = generator.normal(size=WIDTH)
        stored[f"{norm}.weight"] = generator.uniform(0.5, 1.5, WIDTH)
        stored[f"{norm}.bias"] = generator.normal(size=WIDTH) / 4
        scaled = [f"sum_{layer}", f"{norm}.weight", f"{norm}.bias"], [f"hidden_{layer + 1}"], f"norm_{layer}"
        nodes += [
            helper.make_node("MatMul", [f"hidden_{layer}", f"{dense}.weight"], [f"product_{layer}"], f"dense_{layer}"),
            helper.make_node("Add", [f"product_{layer}", f"{dense}.bias"], [f"linear_{layer}"], f"bias_{layer}"),
            helper.make_node("Tanh", [f"linear_{layer}"], [f"tanh_{layer}"], f"node_tanh_{layer}"),
            helper.make_node("Add", [f"tanh_{layer}", f"hidden_{layer}"], [f"sum_{layer}"], f"add_{layer}"),
            helper.make_node("LayerNormalization", *scaled, epsilon=EPSILON),
        ]
    nodes.append(helper.make_node("ReduceMean", [f"hidden_{LAYERS}"], ["mean"], "node_mean", axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "head.weight"], ["logits"], "node_head"))
    arrays = {name: array.astype(np.float32) for name, array in stored.items()}
    inputs = {"input_ids": (TensorProto.INT64, ["batch", "length"])}
    return onnx_model(nodes, inputs, {"logits": ["batch", 2]}, arrays, opset=17, ir_version=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of the encoder in each format."""
    root = tmp_path_factory.mktemp("formats")
    comparison = {name: root / name / "model.onnx" for name in ("onnx", "dynamic")}
    comparison |= {name: root / name / "model.ort" for name in ("ort", "dynamic-ort")}
    for file in comparison.values():
        file.parent.mkdir()
    onnx.save(encoder(), comparison["onnx"])
    onnx.save(DynamicQuantizer(encoder()).quantize(), comparison["dynamic"])
    convert(comparison["onnx"], comparison["ort"])
    convert(comparison["dynamic"], comparison["dynamic-ort"])
    return comparison


def compare(reference: Path, file: Path, target: str | None = None) -> FormatComparison:
    target = target or {".ort": "ort"}.get(file.suffix, "cpu")
    parts = open_value_graph(file, TARGETS[target])
    comparison = compare_parts(onnx.load(reference), node_modules(reference), parts, BATCHES, SilentProgress())
    assert comparison is not None
    return comparison


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.full_range(own_kernels=True)
def test_correct_file_has_no_deviating_layer(files: dict[str, Path], name: str) -> None:
    comparison = compare(files["onnx"], files[name])
    assert comparison.departures == () and comparison.parts > 3 * LAYERS and comparison.examples == len(BATCHES)
    if name in EIGHT_BITS:
        assert 1e-3 < comparison.answers < 0.1 and comparison.worst.bits == 8
        # The error expected from 8 bits is close to the measured one.
        assert 0.3 < comparison.worst.error / comparison.worst.explained < 1.5
    else:
        assert comparison.answers < 1e-5


FAULTS = {"scale": "dense", "transposed": "dense", "epsilon": "norm"}
"""What is wrong, and in which part of a layer."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.full_range(own_kernels=True)
def test_injected_fault_is_located_in_its_layer(files: dict[str, Path], tmp_path: Path, name: str, fault: str) -> None:
    """The layer is random; only it deviates, and alone it causes the error of the outputs."""
    layer = int(np.random.default_rng([len(name), len(fault)]).integers(LAYERS))
    plant = {".onnx": in_onnx, ".ort": in_ort}[files[name].suffix]
    comparison = compare(files["onnx"], plant(files[name], tmp_path, layer, fault))
    assert {item.layer for item in comparison.departures} == {f"encoder.layer.{layer}.{FAULTS[fault]}"}
    first = comparison.departures[0]
    assert first == comparison.worst and first.error > 4 * first.explained and first.before < first.after
    assert first.alone is not None
    if name in EIGHT_BITS:
        assert first.alone > comparison.answers / 2
    else:
        assert first.before < 1e-5 and first.alone == pytest.approx(comparison.answers, rel=1e-3)


def tensor_at_fault(names: list[str], layer: int, fault: str) -> str:
    """Return the name of the weight to transpose, or of the scales (or float weight) to multiply."""
    dense = f"encoder.layer.{layer}.dense.weight"
    endings = ("_scale", "") if fault == "scale" else ("_quantized", "")
    return next(dense + ending for ending in endings if dense + ending in names)


def changed(values: np.ndarray, fault: str) -> np.ndarray:
    return (values * np.float32(1.5)).astype(values.dtype) if fault == "scale" else np.ascontiguousarray(values.T)


def in_onnx(source: Path, folder: Path, layer: int, fault: str) -> Path:
    model = onnx.load(source)
    if fault == "epsilon":
        (norm,) = (node for node in model.graph.node if f"hidden_{layer + 1}" in node.output)
        next(item for item in norm.attribute if item.name == "epsilon").f = 0.2
    else:
        name = tensor_at_fault([item.name for item in model.graph.initializer], layer, fault)
        weight = next(item for item in model.graph.initializer if item.name == name)
        weight.CopyFrom(numpy_helper.from_array(changed(numpy_helper.to_array(weight), fault), name))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def in_ort(source: Path, folder: Path, layer: int, fault: str) -> Path:
    """Change the bytes of the fault in place in an ORT file and return the new file."""
    content = bytearray(source.read_bytes())
    if fault == "epsilon":
        ort_tools()
        from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

        graph = InferenceSession.GetRootAs(content, 0).Model().Graph()
        nodes = [graph.Nodes(index) for index in range(graph.NodesLength())]
        (norm,) = (node for node in nodes if node.Outputs(0) == f"hidden_{layer + 1}".encode())
        (epsilon,) = (
            item for item in (norm.Attributes(index) for index in range(norm.AttributesLength())) if item.F() == EPSILON
        )
        # The field `f` of ort.fbs.
        struct.pack_into("<f", content, epsilon._tab.Pos + epsilon._tab.Offset(10), 0.2)
    else:
        tensors = {item.name: item for item in read_ort(bytes(content), source).tensors}
        at_fault = tensors[tensor_at_fault(list(tensors), layer, fault)]
        wrong = changed(at_fault.values(bytes(content)), fault).tobytes()
        content[at_fault.start : at_fault.start + at_fault.bytes] = wrong
    (folder / "model.ort").write_bytes(content)
    return folder / "model.ort"


def test_files_without_common_values_are_not_compared(files: dict[str, Path]) -> None:
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["other"])]
    stored = {"table": np.ones((WORDS, 2), np.float32)}
    other = onnx_model(nodes, {"input_ids": (TensorProto.INT64, [1, None])}, {"other": None}, stored)
    assert compare_parts(other, {}, open_value_graph(files["onnx"], TARGETS["cpu"]), BATCHES, SilentProgress()) is None


def test_error_is_relative_to_the_spread_of_the_value() -> None:
    """The squared deviations of 1 to 4 sum to 5; a constant's error is relative to its size; NaN is infinite."""
    gap = Gap()
    gap.add(np.float32([1, 2]), np.float32([1, 3]))
    gap.add(np.float32([3, 4]), np.float32([3, 6]))
    assert gap.error == pytest.approx(np.sqrt((1 + 4) / 5))
    constant = Gap()
    constant.add(np.float32([2, 2]), np.float32([2, 3]))
    assert constant.error == pytest.approx(np.sqrt(1 / 8))
    constant.add(np.float32([2]), np.float32([np.nan]))
    assert constant.error == float("inf")


@pytest.mark.parametrize(("bits", "step"), [(8, 3 / 255), (4, 3 / 15)])
def test_coarse_grid_spans_minimum_to_maximum(bits: int, step: float) -> None:
    values = np.float32([[-1, 0.123, 0.77, 2]])
    np.testing.assert_allclose(on_coarse_grid(values, bits), np.rint(values / step) * step, rtol=1e-6)
    np.testing.assert_array_equal(on_coarse_grid(values, 16), values.astype(np.float16).astype(np.float32))
    assert on_coarse_grid(values, 32) is values
    # 4-bit grids have a scale per 32 weights of a row, 8-bit convolutions one per channel.
    wide = np.concatenate([values.repeat(8, 1), values.repeat(8, 1) * 100], axis=1)
    assert np.abs(on_coarse_grid(wide, 4)[:, :32] - wide[:, :32]).max() <= 0.11
    channels = np.stack([values, values * 100])[..., None]
    assert np.abs(on_coarse_grid(channels, 8)[0] - channels[0]).max() <= 0.006


@pytest.mark.slow
@pytest.mark.parametrize("target", ["node", pytest.param("browser", marks=pytest.mark.browser)])
@pytest.mark.full_range(own_kernels=True)
def test_comparison_runs_on_the_target(files: dict[str, Path], tmp_path: Path, target: str) -> None:
    """In WebAssembly the quantized file has no deviating layer, and a fault is located with either reference."""
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with")
    assert prepare_runtime(TARGETS[target], SilentProgress()) is None
    assert compare(files["onnx"], files["dynamic"], target).departures == ()
    wrong = in_onnx(files["dynamic"], tmp_path, 2, "scale")
    for reference in ("onnx", "dynamic"):
        comparison = compare(files[reference], wrong, target)
        assert {item.layer for item in comparison.departures} == {"encoder.layer.2.dense"}
