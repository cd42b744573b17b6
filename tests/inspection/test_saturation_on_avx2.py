"""Tests of ONNX Runtime's x86 kernels without VNNI: saturation of 8-bit products, and narrowed weights that avoid it.

They run on this processor restricted to AVX2 (`tests/support/as_avx2.py`) or on an emulated Haswell (Debian:
qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from as_avx2 import hold, run_held
from onnx import TensorProto, helper
from onnx_graphs import onnx_model

from compress.formats.onnx.int8.dynamic import DynamicQuantizer
from compress.formats.onnx.int8.settings import Int8Options, ReduceRange
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.inspection.activation_clipping import find_saturation
from compress.numerics.int8_activations import pairwise_saturating
from compress.utils.environment import processor_class

ROWS, INNER, COLUMNS = 7, 90, 33
CHANNELS = 24
RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for graph in sys.argv[2:]:
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    np.save(graph + sys.argv[1], session.run(None, {"x": np.load(graph + ".x.npy")})[0])
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hold(tmp_path_factory.mktemp("held"))


def write(graph: onnx.ModelProto, x: np.ndarray, file: Path) -> str:
    onnx.save(graph, file)
    np.save(f"{file}.x.npy", x)
    return str(file)


def integer_product() -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    weight = generator.integers(-128, 128, (INNER, COLUMNS)).astype(np.int8)
    rows = generator.integers(0, 256, (ROWS, INNER)).astype(np.uint8)
    node, output = helper.make_node("MatMulInteger", ["x", "w"], ["y"]), (TensorProto.INT32, [ROWS, COLUMNS])
    return onnx_model([node], {"x": (TensorProto.UINT8, [ROWS, INNER])}, {"y": output}, {"w": weight}), rows, weight


def check_cut_off(output: np.ndarray, rows: np.ndarray, weight: np.ndarray) -> None:
    expected, cut = pairwise_saturating(rows, weight)
    assert cut > 0 and (expected != rows.astype(int) @ weight.astype(int)).any()
    np.testing.assert_array_equal(output, expected)


def test_emulated_saturation_matches_avx2_kernels(held: dict[str, str], tmp_path: Path):
    graph, rows, weight = integer_product()
    run_held(["-c", RUN, ".y.npy", write(graph, rows, tmp_path / "model.onnx")], held)
    check_cut_off(np.load(tmp_path / "model.onnx.y.npy"), rows, weight)


@pytest.mark.slow
def test_emulated_saturation_matches_emulated_haswell(tmp_path: Path):
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None:
        pytest.skip("no qemu-x86_64 on PATH")
    graph, rows, weight = integer_product()
    file = write(graph, rows, tmp_path / "model.onnx")
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", RUN, ".y.npy", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check_cut_off(np.load(f"{file}.y.npy"), rows, weight)


def convolutions(*shape: int, groups: int = 1) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """Return two convolutions with biases and kernels of ``shape``, whose weights have nearly one sign and size."""
    generator = np.random.default_rng(0)
    arrays = {
        "w0": generator.uniform(0.7, 1, (CHANNELS, 6 // groups, *shape)),
        "w1": generator.uniform(-1, -0.7, (8, CHANNELS // groups, *shape)),
        "b0": generator.normal(size=CHANNELS),
        "b1": generator.normal(size=8),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["h"], name="first", group=groups),
        helper.make_node("Conv", ["h", "w1", "b1"], ["y"], name="second", group=groups),
    ]
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    x, y = ([1, channels, *[None] * len(shape)] for channels in (6, 8))
    feeds = [{"x": generator.uniform(-0.1, 1, (1, 6, *[9] * len(shape))).astype(np.float32)} for _ in range(6)]
    return onnx_model(nodes, {"x": x}, {"y": y}, weights), feeds


def products() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    generator = np.random.default_rng(0)
    weights = {"w0": generator.uniform(0.7, 1, (64, 64)), "w1": generator.uniform(-1, -0.7, (48, 64))}
    arrays = {**weights, "b1": generator.normal(size=48)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "w1", "b1"], ["y"], name="second", transB=1),
    ]
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    feeds = [{"x": generator.uniform(-0.1, 1, (5, 64)).astype(np.float32)} for _ in range(6)]
    return onnx_model(nodes, {"x": ["n", 64]}, {"y": ["n", 48]}, arrays), feeds


NETS = {
    "products": products,
    "convolutions": lambda: convolutions(3, 3),
    "convolutions over time": lambda: convolutions(3),
    "convolutions in groups": lambda: convolutions(3, 3, groups=2),
}
CASES = [*((net, "static") for net in NETS), ("products", "dynamic"), ("convolutions", "feedback")]
GRAPHS = ("float", "wide", "narrow")


def graphs(net: str, method: str) -> tuple[list[onnx.ModelProto], np.ndarray]:
    """Return the float graph, the 8-bit graph, the graph with narrowed weights, and an input."""
    model, feeds = NETS[net]()
    ranges: tuple[ReduceRange, ...] = (False, "saturating")
    if method == "dynamic":
        quantized = [DynamicQuantizer(model, reduce_range=reduce_range).quantize() for reduce_range in ranges]
    else:
        rounding = "feedback" if method == "feedback" else "nearest"
        options = [Int8Options(method="static", reduce_range=each, weight_rounding=rounding) for each in ranges]
        quantized = [StaticQuantizer(model, feeds, settings).quantize() for settings in options]
    return [model, *quantized], feeds[0]["x"]


def grouped() -> tuple[onnx.ModelProto, np.ndarray]:
    """Return an 8-bit convolution of four groups with different weights, and an input."""
    generator = np.random.default_rng(0)
    weights = generator.uniform(0.7, 1, (32, 5, 3, 3)) * np.repeat([1, -1, 1, -1], 8).reshape(-1, 1, 1, 1)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", group=4, pads=[1, 0, 1, 0], strides=[2, 1])
    model = onnx_model([node], {"x": [1, 20, 9, 9]}, {"y": None}, {"w": weights.astype(np.float32)})
    x = generator.uniform(-0.1, 1, (1, 20, 9, 9)).astype(np.float32)
    settings = Int8Options(method="static", reduce_range=False, bias_correction=False)
    return StaticQuantizer(model, [{"x": x}], settings).quantize(), x


@pytest.fixture(scope="module")
def output_folder(held: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the outputs of each graph and case, natively and on AVX2 (one process each for all)."""
    if processor_class() != "x86-vnni":
        pytest.skip("this processor has no VNNI to compare with")
    folder = tmp_path_factory.mktemp("output_folder")
    written = []
    for index, case in enumerate(CASES):
        quantized, x = graphs(*case)
        written += [write(graph, x, folder / f"{index}-{name}") for name, graph in zip(GRAPHS, quantized, strict=True)]
    written.append(write(*grouped(), folder / "grouped"))
    run_held(["-c", RUN, ".avx2.npy", *written], held)
    subprocess.run([sys.executable, "-c", RUN, ".vnni.npy", *written], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("place", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_narrowed_weights_give_equal_outputs_on_avx2_and_vnni(place: int, output_folder: Path):
    results = {
        (name, kind): np.load(output_folder / f"{place}-{name}.{kind}.npy")
        for name in GRAPHS
        for kind in ("avx2", "vnni")
    }
    whole = np.abs(results["float", "vnni"]).mean()
    assert np.abs(results["wide", "avx2"] - results["wide", "vnni"]).mean() > 0.05 * whole
    np.testing.assert_allclose(results["narrow", "avx2"], results["narrow", "vnni"], atol=1e-5 * whole)
    assert np.abs(results["narrow", "avx2"] - results["float", "vnni"]).mean() < 0.02 * whole


def test_saturation_of_grouped_convolution_matches_avx2(output_folder: Path):
    graph, x = grouped()
    (results,) = find_saturation(graph, [{"x": x}])
    on_avx2, with_vnni = (np.load(output_folder / f"grouped.{kind}.npy").astype(float) for kind in ("avx2", "vnni"))
    assert results.cut and results.cut > 0.1
    error = np.sqrt(np.square(on_avx2 - with_vnni).mean() / np.square(with_vnni).mean())
    # The outputs are rounded to 8 bits once more.
    assert results.error == pytest.approx(error, rel=0.1)
