"""Tests of ONNX Runtime as a runtime: sessions, shared caches and operator profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graph_shapes import shapes_by_running
from onnx import TensorProto, helper
from onnx_graphs import onnx_model
from quantized import quantize_tiny_llama, save_tiny_llama
from written_decoders import CONFIGS, Graph, greedy_tokens, random_ids, save_decoder

from compress.formats.generation.decoder import Decoder
from compress.formats.onnx.costs import Tensor
from compress.formats.onnx.decoder import export_decoder
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes import onnxruntime as subject
from compress.formats.onnx.runtimes.onnxruntime import RUNTIME
from compress.formats.onnx.runtimes.profile import NodeRun, ProfiledSession, read_profile, shapes_of, write_optimized
from compress.formats.runtime import get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.utils.errors import InputError, ModelError, StageError

CPU = TARGETS["cpu"]


def write_linear(path: Path, weight: np.ndarray) -> Path:
    """Write the graph y = x @ weight for float32 x [n, rows of weight] and return its path."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    ends = {"x": ["n", weight.shape[0]]}, {"y": ["n", weight.shape[1]]}
    model = onnx_model(nodes, *ends, {"w": weight.astype(np.float32)}, opset=17)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def test_session_output_matches_numpy(tmp_path: Path, weight: np.ndarray) -> None:
    write_linear(tmp_path / "onnx" / "model_quantized.onnx", weight)
    session = get_runtime("onnxruntime").open(tmp_path, CPU, threads=1)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    outputs = session.predict({"x": x, "token_type_ids": np.zeros(4)})
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], x @ weight, rtol=1e-5)
    assert session.inputs == ("x",)
    assert session.provider == "CPUExecutionProvider"
    assert session.settings["intra_op_threads"] == 1


def test_missing_input_and_zero_threads_are_refused(tmp_path: Path, weight: np.ndarray) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    with pytest.raises(InputError, match="lacks the model's input x"):
        RUNTIME.open(path, CPU, threads=1).predict({"input_ids": np.zeros((1, 3))})
    with pytest.raises(InputError, match="0 threads"):
        RUNTIME.open(path, CPU, threads=0)


@pytest.mark.parametrize("x", [np.zeros((1, 4), np.float32), np.zeros((1, 3), np.int64), np.zeros(3, np.float32)])
def test_a_wrong_shape_or_type_is_an_input_error(tmp_path: Path, weight: np.ndarray, x: np.ndarray) -> None:
    session = RUNTIME.open(write_linear(tmp_path / "m.onnx", weight), CPU, threads=1)
    with pytest.raises(InputError, match="refuses the batch") as caught:
        session.predict({"x": x})
    assert "x tensor(float) ['n', 3]" in str(caught.value)


def test_a_folder_must_hold_exactly_one_graph(tmp_path: Path, weight: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"0 \.onnx files"):
        find_graph(tmp_path)
    write_linear(tmp_path / "onnx" / "model.onnx", weight)
    assert find_graph(tmp_path) == tmp_path / "onnx" / "model.onnx"
    write_linear(tmp_path / "onnx" / "decoder.onnx", weight)
    with pytest.raises(ModelError, match=r"2 \.onnx files \(onnx/decoder.onnx, onnx/model.onnx\)"):
        find_graph(tmp_path)


def test_missing_or_unsupported_artifact_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        find_graph(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is no \.onnx file"):
        find_graph(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_graph_is_a_model_error(tmp_path: Path, weight: np.ndarray, share: float) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match="cannot open the graph"):
        RUNTIME.open(path, CPU, threads=1)


def _without_weights(model: onnx.ModelProto, path: Path) -> None:
    onnx.save_model(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    path.with_name("weights.data").unlink()


def _changed(change: Callable[[onnx.ModelProto], object]) -> Callable[[onnx.ModelProto, Path], None]:
    def spoil(model: onnx.ModelProto, path: Path) -> None:
        change(model)
        onnx.save(model, path)

    return spoil


def _rows(model: onnx.ModelProto) -> onnx.TensorShapeProto.Dimension:
    return model.graph.input[0].type.tensor_type.shape.dim[1]


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (_without_weights, "weights.data", "copy the folder"),
        (_changed(lambda model: setattr(model.opset_import[0], "version", 99)), "till opset", "`opset`"),
        (_changed(lambda model: setattr(model.graph.node[0], "op_type", "Mine")), "Mine", "custom"),
        (_changed(lambda model: setattr(_rows(model), "dim_value", 5)), "ShapeInferenceError", "again"),
    ],
)
def test_error_of_an_invalid_graph_has_reason_and_hint(
    tmp_path: Path, weight: np.ndarray, spoil: Callable[[onnx.ModelProto, Path], None], message: str, hint: str
) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    spoil(onnx.load(path), path)
    with pytest.raises(ModelError, match=message) as raised:
        RUNTIME.open(path, CPU, threads=1)
    assert hint in (raised.value.hint or "") and raised.value.where == str(path)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_missing_provider_is_refused_with_its_reason(tmp_path: Path, weight: np.ndarray) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    assert why_unavailable(CPU) is None
    assert "has no CUDAExecutionProvider" in (why_unavailable(TARGETS["gpu"]) or "")
    with pytest.raises(StageError, match="'gpu' is not available here"):
        RUNTIME.open(path, TARGETS["gpu"], threads=1)


def test_a_silent_fallback_is_refused(tmp_path: Path, weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, a CUDA build of ONNX Runtime lists CUDA and then silently falls back to the CPU."""

    class FallingBack(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: object, sess_options: object = None, providers: object = None) -> None:
            super().__init__(model, sess_options, providers=["CPUExecutionProvider"])

    path = write_linear(tmp_path / "m.onnx", weight)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallingBack)
    subject._why_not.cache_clear()
    try:
        assert "does not start here" in (why_unavailable(TARGETS["gpu"]) or "")
        monkeypatch.setattr(subject.OnnxRuntime, "unavailable", lambda self, target: None)
        with pytest.raises(StageError, match="took CPUExecutionProvider in place of CUDAExecutionProvider"):
            RUNTIME.open(path, TARGETS["gpu"], threads=1)
    finally:
        subject._why_not.cache_clear()


def test_format_registry_does_not_import_onnxruntime() -> None:
    code = "import sys, compress.formats.registry; sys.exit('onnxruntime' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def open_decoder(path: Path) -> Decoder:
    return Decoder(RUNTIME.open(path, TARGETS["cpu"], threads=1), "tiny")


@pytest.mark.parametrize("name", ["llama", "mistral", "quantized"])
def test_shared_cache_generates_the_same_tokens(name: str, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS["llama" if name == "quantized" else name])
    weights = quantize_tiny_llama(source, tmp_path / "quantized") if name == "quantized" else source
    model = export_decoder(weights)
    shared, plain = tmp_path / "shared.onnx", tmp_path / "plain.onnx"
    onnx.save_model(model.graph, shared)
    del model.graph.metadata_props[:]
    onnx.save_model(model.graph, plain)
    in_place, other = open_decoder(shared), open_decoder(plain)
    assert in_place._shared is not None
    assert other._shared is None
    for prompt, count in (([7, 40, 3], 12), ([9], 3), ([(index * 37) % 150 + 3 for index in range(240)], 15)):
        assert greedy_tokens(in_place, prompt, count) == greedy_tokens(other, prompt, count)


def test_cache_buffer_grows_and_keeps_its_content(tmp_path: Path) -> None:
    model = export_decoder(save_tiny_llama(tmp_path / "source", max_position_embeddings=640))
    onnx.save_model(model.graph, tmp_path / "model.onnx")
    session = RUNTIME.open(tmp_path / "model.onnx", TARGETS["cpu"], threads=1)
    names = {name: name.replace("past_key_values", "present") for name in session.inputs if name.startswith("past")}
    cache = session.shared_cache(names)
    ids = random_ids(1, 270)
    expected, _ = Graph(model.graph).run(ids)
    for seen, total in ((0, 250), *((position, position + 1) for position in range(250, 270))):
        feed = {"input_ids": ids[:, seen:total], "attention_mask": np.ones((1, total), np.int64)}
        actual = cache.predict(feed, seen, total)
        np.testing.assert_allclose(actual, expected[:, seen:total], atol=2e-4, rtol=1e-4)


def test_error_of_a_failed_call_names_the_file(tmp_path: Path) -> None:
    onnx.save_model(export_decoder(save_tiny_llama(tmp_path / "source")).graph, tmp_path / "model.onnx")
    decoder = open_decoder(tmp_path / "model.onnx")
    with pytest.raises(StageError, match="failed on a token") as error:
        decoder.prefill([100_000])
    assert "model.onnx" in str(error.value.where)


@pytest.fixture(scope="module", params=["float", "int8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a tiny exported encoder in the requested precision."""
    proto = exports.exported().graph()
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    onnx.save(quantize_products(proto, True, False) if request.param == "int8" else proto, path)
    return path


def types(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(ir.DataType.from_numpy(array.dtype), array.shape) for name, array in batch.items()}


def test_optimized_graph_is_equal_and_every_node_is_timed(source: Path, tmp_path: Path) -> None:
    path = write_optimized(source, tmp_path, threads=1)
    names = [str(node.name) for node in ir.load(path).graph]
    assert len(set(names)) == len(names) > 10
    session = ProfiledSession(path, threads=1)
    batches = [exports.batch(1, 7, vocabulary=30, pad=0), exports.batch(4, 12, vocabulary=30, pad=0)]
    for batch in (*batches, batches[0]):
        (answer,) = session.session.predict(batch).values()
        np.testing.assert_array_equal(answer, exports.run(source.read_bytes(), **batch))
    calls = read_profile(session.end())
    assert [set(call) for call in calls] == [set(names)] * 3
    assert all(run.microseconds >= 0 for call in calls for run in call.values())


def test_profiled_shapes_match_the_run(source: Path, tmp_path: Path) -> None:
    path = write_optimized(source, tmp_path, threads=1)
    batch = exports.batch(3, 9, vocabulary=30, pad=0)
    session = ProfiledSession(path, threads=1)
    session.session.predict(batch)
    graph = ir.load(path).graph
    shapes = shapes_of(graph, read_profile(session.end())[0], types(batch))
    assert shapes == shapes_by_running(path, batch)


def test_branch_time_belongs_to_the_enclosing_node(tmp_path: Path) -> None:
    """The MatMuls within the If count as its time; the MatMul after it has its own entry."""

    def branch(name: str, times: int) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x" if i == 0 else f"{name}{i - 1}", "w"], [f"{name}{i}"]) for i in range(times)
        ]
        out = helper.make_tensor_value_info(f"{name}{times - 1}", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out])

    nodes = [
        helper.make_node("If", ["flag"], ["middle"], then_branch=branch("a", 1), else_branch=branch("b", 2)),
        helper.make_node("MatMul", ["middle", "w"], ["y"]),
    ]
    inputs = {"flag": (TensorProto.BOOL, [1]), "x": [4, 32]}
    square = {"w": np.full((32, 32), 0.01, np.float32)}
    onnx.save(onnx_model(nodes, inputs, {"y": [4, 32]}, square, opset=17), tmp_path / "if.onnx")
    path = write_optimized(tmp_path / "if.onnx", tmp_path, threads=1)
    session = ProfiledSession(path, threads=1)
    session.session.predict({"flag": np.array([False]), "x": np.ones((4, 32), np.float32)})
    (call,) = read_profile(session.end())
    assert set(call) == {str(node.name) for node in ir.load(path).graph}
    assert len(call) == 2


def test_optimized_graph_has_external_weights(tmp_path: Path) -> None:
    path = write_optimized(write_linear(tmp_path / "m.onnx", np.ones((256, 256))), tmp_path, threads=1)
    assert path.stat().st_size < 4096
    assert (tmp_path / "optimized.data").stat().st_size >= 256 * 256 * 4


def events(durations: list[int], kinds: dict[str, list[dict[str, list[int]]]]) -> str:
    """Return a profile in JSON with one call per duration, in which every node takes that duration."""
    profile: list[dict[str, object]] = []
    for duration in durations:
        for name, outputs in kinds.items():
            arguments = {"output_type_shape": outputs}
            profile.append({"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": arguments})
        profile.append({"cat": "Session", "name": "model_run", "dur": 20, "args": {}})
    return json.dumps(profile)


def test_node_with_unknown_tensor_type_has_no_shapes_in_any_call(tmp_path: Path) -> None:
    kinds = {"a#0": [{"float": [2]}, {"Int4x2": [3]}], "b#1": [{"float16": [2]}], "inner": [{"float": [1]}]}
    (tmp_path / "notes.json").write_text(events([5, 9], kinds))
    expected = [
        {"a#0": NodeRun(duration, ()), "b#1": NodeRun(duration, (Tensor(ir.DataType.FLOAT16, (2,)),))}
        for duration in (5, 9)
    ]
    assert read_profile(tmp_path / "notes.json") == expected
