"""Tests of weight comparison: matched tensors, rounding and causes of changes, for known changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from mergeable import save_mergeable_llama
from onnx import helper
from onnx_graphs import onnx_model
from quantized import quantize_tiny_llama
from safetensors.numpy import load_file, save_file
from stage_contract import language_context, stage_of

from compress.plugins.diff.activations import compare_files
from compress.plugins.diff.models import percent
from compress.plugins.diff.record import TensorChange, WeightsDiff
from compress.plugins.diff.weights import compare_weights
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

RANDOM = np.random.default_rng(2)
WEIGHT = RANDOM.standard_normal((48, 32)).astype(np.float32)
OTHER = RANDOM.standard_normal((48, 32)).astype(np.float32)
VECTOR = RANDOM.standard_normal(48).astype(np.float32)
NAMES = ("layers.0.a.weight", "layers.1.a.weight", "layers.1.a.bias")
TENSORS = dict(zip(NAMES, (WEIGHT, OTHER, VECTOR), strict=True))
PROGRESS = SilentProgress()


def written(folder: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def compared(folder: Path, after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] = TENSORS) -> WeightsDiff:
    return compare_weights(written(folder / "a", before), written(folder / "b", after), PROGRESS)


def only(diff: WeightsDiff) -> TensorChange:
    """Return the single changed tensor."""
    (change,) = diff.having("changed")
    return change


def test_model_is_identical_to_itself(tmp_path: Path) -> None:
    diff = compared(tmp_path, TENSORS)
    assert diff.verdict == "identical" and not diff.layers and len(diff.tensors) == 3


def test_scaled_layer_is_reported_with_its_factor(tmp_path: Path) -> None:
    change = only(compared(tmp_path, {**TENSORS, NAMES[1]: OTHER * np.float32(1.02)}))
    assert change.name == NAMES[1] and change.layer == "layers.1"
    assert change.relative == pytest.approx(0.02, rel=1e-3) and change.factor == pytest.approx(1.02, rel=1e-5)
    assert change.causes == ("all of it is 1.020 times what it was",)


def test_two_values_are_not_reported_as_scaled(tmp_path: Path) -> None:
    """The bias of two classes is (-x, x), so that any retrained bias is a multiple of the original."""
    bias_before, after = (np.array([-size, size], np.float32) for size in (0.013, -0.4))
    with_bias = {**TENSORS, "classifier.bias": bias_before}
    change = only(compared(tmp_path, {**TENSORS, "classifier.bias": after}, with_bias))
    assert change.name == "classifier.bias" and not change.causes


def test_layers_are_sorted_by_change(tmp_path: Path) -> None:
    noise = RANDOM.standard_normal(WEIGHT.shape).astype(np.float32)
    diff = compared(tmp_path, {**TENSORS, NAMES[0]: WEIGHT + 0.05 * noise, NAMES[1]: OTHER + 0.2 * noise})
    assert [layer.name for layer in diff.layers] == ["layers.1", "layers.0"]
    expected_distance = 0.2 * np.linalg.norm(noise) / np.linalg.norm(OTHER)
    assert diff.having("changed")[1].unexplained == pytest.approx(expected_distance, rel=1e-4)


def test_bias_of_zeros_does_not_hide_the_change_of_its_matrix(tmp_path: Path) -> None:
    """A change relative to a bias of zeros is infinite, and says nothing about its layer."""
    before = {**TENSORS, "pooler.weight": WEIGHT, "pooler.bias": np.zeros(48, np.float32)}
    bias = np.full(48, 1e-3, np.float32)
    after = {**before, "pooler.weight": WEIGHT * np.float32(1.1), "pooler.bias": bias, NAMES[1]: OTHER * 2}
    diff = compared(tmp_path, after, before)
    assert [layer.name for layer in diff.layers] == ["layers.1", "pooler"]
    difference = np.linalg.norm(0.1 * WEIGHT) ** 2 + np.linalg.norm(bias) ** 2
    assert diff.layers[1].relative == pytest.approx(np.sqrt(difference) / np.linalg.norm(WEIGHT), rel=1e-4)
    assert diff.layers[1].worst == "pooler.weight"


def test_share_of_almost_nothing_is_short() -> None:
    assert (percent(0.0312), percent(1.5), percent(1e9)) == ("3.12%", "150%", "over 10,000%")


def test_added_removed_and_resized_tensors_are_named(tmp_path: Path) -> None:
    after = {NAMES[0]: WEIGHT[:40], "new.weight": RANDOM.standard_normal((5, 7)).astype(np.float32), NAMES[1]: OTHER}
    diff = compared(tmp_path, after)
    assert diff.resized == (f"{NAMES[0]}: [48, 32] \u2192 [40, 32]",)
    assert diff.added == ("new.weight",) and diff.removed == (NAMES[2],) and diff.verdict == "changed"


def test_renamed_tensor_is_matched_by_its_values(tmp_path: Path) -> None:
    diff = compared(tmp_path, {"first.weight": WEIGHT, NAMES[1]: OTHER, NAMES[2]: VECTOR})
    renamed = next(tensor for tensor in diff.tensors if tensor.name == NAMES[0])
    assert (renamed.other, renamed.by, renamed.how) == ("first.weight", "content", "identical")
    assert not diff.added and not diff.removed


def test_pruning_pattern_and_zeroed_rows_are_distinguished(tmp_path: Path) -> None:
    pruned = OTHER.copy().reshape(48, -1, 4)
    np.put_along_axis(pruned, np.abs(pruned).argsort(axis=-1)[..., :2], 0, axis=-1)
    change = only(compared(tmp_path, {**TENSORS, NAMES[1]: pruned.reshape(48, 32)}))
    assert change.causes == ("pruned by 2:4: 50.0% zeros where there were 0.0%, the others are unchanged",)
    rows = WEIGHT.copy()
    rows[[4, 9, 30]] = 0
    again = only(compare_weights(tmp_path / "a", written(tmp_path / "c", {**TENSORS, NAMES[0]: rows}), PROGRESS))
    assert again.zeroed_rows == (4, 9, 30)
    assert again.causes == ("rows 4, 9, 30 are all zeros now, the others are unchanged",)


def test_non_finite_values_are_reported_as_the_cause(tmp_path: Path) -> None:
    broken = OTHER.copy()
    broken[0, :2] = np.nan
    change = only(compared(tmp_path, {**TENSORS, NAMES[1]: broken}))
    assert change.causes == ("2 values are not finite",)


def integers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 weights, rounded to nearest, and the scale of each row."""
    scales = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def graph(folder: Path, factor: float = 1.0) -> Path:
    """Write a graph with both weights concatenated as int8 [inputs, outputs], with one scale per output."""
    both = np.concatenate([WEIGHT, OTHER])
    stored, scales = integers(both)
    constants = {
        "val_1_quantized": stored.T,
        "val_1_scale": (scales * np.where(np.arange(96) < 48, factor, 1)).astype(np.float32),
        "val_1_zero_point": np.zeros(96, np.int8),
        "b": VECTOR,
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["val_1_quantized", "val_1_scale", "val_1_zero_point"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Concat", ["b", "b"], ["bb"], axis=0),
        helper.make_node("Add", ["y", "bb"], ["z"]),
    ]
    folder.mkdir()
    onnx.save(onnx_model(nodes, {"x": [1, 32]}, {"z": [1, 96]}, constants), folder / "model.onnx")
    return folder


def test_int8_graph_differs_by_rounding_only(tmp_path: Path) -> None:
    diff = compare_weights(written(tmp_path / "a", TENSORS), graph(tmp_path / "b"), PROGRESS)
    assert diff.verdict == "rounded" and not diff.removed and not diff.added
    tensors = {tensor.name: tensor for tensor in diff.tensors}
    for name, weight in ((NAMES[0], WEIGHT), (NAMES[1], OTHER)):
        stored, scales = integers(weight)
        error = stored * scales[:, None] - weight
        assert tensors[name].relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(weight), rel=1e-3)
        assert tensors[name].within_half_step == 1.0 and tensors[name].times_rounding == pytest.approx(1, abs=0.1)
        assert tensors[name].unexplained == 0 and tensors[name].by == "content"
    assert tensors[NAMES[2]].how == "identical"


def test_wrong_scales_are_not_explained_by_rounding(tmp_path: Path) -> None:
    diff = compare_weights(written(tmp_path / "a", TENSORS), graph(tmp_path / "b", 1.02), PROGRESS)
    change = only(diff)
    assert change.name == NAMES[0] and change.unexplained == pytest.approx(0.02, abs=0.003)
    assert diff.layers[0].name == "layers.0"


def test_gguf_and_gptq_decoders_differ_by_rounding_only(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "decoder")
    packed = quantize_tiny_llama(source, tmp_path / "gptq")
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    stage_of("gguf", {}).run(source, language_context(tmp_path / "texts")).save(gguf)
    for folder, bits in ((packed.folder, 4), (gguf, None)):
        diff = compare_weights(source.folder, folder, PROGRESS)
        assert diff.verdict == "rounded" and not (diff.added or diff.removed or diff.resized or diff.unread)
        compared_tensors = {tensor.name: tensor for tensor in diff.tensors}
        query = compared_tensors["model.layers.0.self_attn.q_proj.weight"]
        assert query.how == "rounded" and (bits is None or query.bits == (32, bits))
        assert all((tensor.times_rounding or 0) < 1.2 for tensor in diff.tensors)
    assert query.other == "blk.0.attn_q.weight" and "permuted" in query.causes[0]
    # Two swapped heads are not explained by GGUF's order of rows within a head.
    tensors = {name: array.copy() for name, array in load_file(source.folder / "model.safetensors").items()}
    rows = tensors["model.layers.0.self_attn.q_proj.weight"]
    rows[:32] = rows[np.r_[16:32, 0:16]]
    again = compare_weights(written(tmp_path / "swapped", tensors), gguf, PROGRESS)
    assert [tensor.name for tensor in again.having("changed")] == ["model.layers.0.self_attn.q_proj.weight"]


def test_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle"):
        compare_weights(written(tmp_path / "a", TENSORS), tmp_path / "b", PROGRESS)


GENERATOR = np.random.default_rng(1)
WEIGHTS = [GENERATOR.standard_normal((16, 16)).astype(np.float32) for _ in range(3)]
BATCHES = [{"x": GENERATOR.standard_normal((4, 16)).astype(np.float32), "more": np.zeros(1)} for _ in range(2)]


def product_graph(folder: Path, weights: list[np.ndarray]) -> Path:
    """Write a graph of three successive MatMul nodes whose weights have layer names."""
    constants = {f"layer.{number}.weight": weight for number, weight in enumerate(weights)}
    nodes = [
        helper.make_node("MatMul", [f"y{number - 1}" if number else "x", name], [f"y{number}"], name=f"m{number}")
        for number, name in enumerate(constants)
    ]
    folder.mkdir()
    onnx.save(onnx_model(nodes, {"x": [None, 16]}, {"y2": [None, 16]}, constants, 17), folder / "model.onnx")
    return folder


def test_first_differing_operator_is_reported_with_its_error(tmp_path: Path) -> None:
    file_before = product_graph(tmp_path / "a", WEIGHTS)
    after = product_graph(tmp_path / "b", [WEIGHTS[0], WEIGHTS[1] * np.float32(1.25), WEIGHTS[2]])
    comparison = compare_files(file_before, after, BATCHES, PROGRESS)
    assert comparison.first == "layer.1" and [module.module for module in comparison.modules] == ["layer.1"]
    given = np.concatenate([batch["x"] for batch in BATCHES]) @ WEIGHTS[0] @ WEIGHTS[1]
    assert comparison.error == pytest.approx(0.25 * np.sqrt((given**2).mean()) / given.std() / 1.0, rel=1e-3)
    same = compare_files(file_before, file_before, BATCHES, PROGRESS)
    assert same is not None and same.first is None and same.notes[0].startswith("0 of 3 operators")
    # These batches lack the graph's input.
    assert compare_files(file_before, file_before, [{"input_ids": np.zeros((1, 4))}], PROGRESS) is None
