"""Convolutions that read a concatenation: the same sums, and ranges of their own for each part."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.split_concatenations import split_concatenations
from compress.formats.onnx.int8.static import StaticQuantizer

WIDE, NARROW = 100.0, 1.0
CHANNELS = (16, 24)
SIZES = np.random.default_rng(7)
WEIGHT = SIZES.standard_normal((8, sum(CHANNELS), 1, 1)).astype(np.float32)
WEIGHT[:, : CHANNELS[0]] *= NARROW / WIDE
BIAS = SIZES.standard_normal(8).astype(np.float32)


def skip_graph(weight: np.ndarray = WEIGHT, groups: int = 1, axis: int = 1, **attributes: object) -> onnx.ModelProto:
    """What comes from below and what was kept, joined and read by a convolution, and by an average beside it."""
    nodes = [
        helper.make_node("Concat", ["below", "kept"], ["joined"], name="concat", axis=axis),
        helper.make_node("Conv", ["joined", "weight", "bias"], ["out"], name="shortcut", group=groups, **attributes),
        helper.make_node("GlobalAveragePool", ["joined"], ["mean"], name="mean"),
    ]
    shape = [None, None, None, None]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("below", "kept")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("out", "mean")]
    stored = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(BIAS, "bias")]
    graph = helper.make_graph(nodes, "skip", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    """Uniform values, one part a hundred times as far as the other."""
    drawn = np.random.default_rng(1)
    parts = (("below", WIDE, CHANNELS[0]), ("kept", NARROW, CHANNELS[1]))
    return [
        {name: drawn.uniform(-r, r, (2, n, 12, 12)).astype(np.float32) for name, r, n in parts} for _ in range(count)
    ]


def run(graph: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def exact(feed: dict[str, np.ndarray], weight: np.ndarray = WEIGHT, **options: int) -> np.ndarray:
    """torch's own convolution of the concatenation, in 64 bits."""
    joined = torch.cat([torch.from_numpy(feed[name]).double() for name in ("below", "kept")], dim=1)
    result = torch.nn.functional.conv2d(
        joined, torch.from_numpy(weight).double(), torch.from_numpy(BIAS).double(), **options
    )
    return np.asarray(result.numpy())


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 2, 1)])
def test_the_sum_of_the_parts_is_the_convolution(size: int, stride: int, padding: int) -> None:
    weight = SIZES.standard_normal((8, sum(CHANNELS), size, size)).astype(np.float32)
    model = ir.from_proto(skip_graph(weight, strides=[stride] * 2, pads=[padding] * 4))
    (feed,) = feeds(1)
    assert split_concatenations(model, [feed]) == ["shortcut"]
    graph = ir.to_proto(model)
    assert [node.name for node in graph.graph.node if node.op_type == "Conv"] == ["shortcut/part_0", "shortcut/part_1"]
    actual = run(graph, feed)
    expected = exact(feed, weight, stride=stride, padding=padding)
    np.testing.assert_allclose(actual["out"], expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(actual["mean"][:, : CHANNELS[0], 0, 0], feed["below"].mean(axis=(2, 3)), atol=1e-3)


def rounded(values: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    return np.round(values / step) * step


def by_hand(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Sums of activations [pixels, n] rounded in 255 steps of their range, weights [n, 8] in 127 of each column's."""
    total = BIAS.astype(np.float64)
    for values, weight in parts:
        columns = np.abs(weight).max(axis=0) / 127
        product = rounded(values, np.ptp(values) / 255) @ rounded(weight, columns)
        total = total + rounded(product, np.ptp(product) / 255)
    return total


@pytest.mark.full_range
def test_each_part_has_the_rounding_of_its_own_range() -> None:
    """Against the same rounding done by hand: with one scale each, the parts lose what the other's range takes."""
    examples = feeds(1)
    exact_output = exact(examples[0]).transpose(0, 2, 3, 1).reshape(-1, 8)
    values = [array.transpose(0, 2, 3, 1).reshape(-1, array.shape[1]) for array in examples[0].values()]
    columns = np.split(WEIGHT[:, :, 0, 0].T.astype(np.float64), CHANNELS[:1])
    expected = {
        False: by_hand([(np.concatenate(values, axis=1), np.concatenate(columns))]),
        True: by_hand(list(zip(values, columns, strict=True))),
    }
    errors = {}
    for split in (False, True):
        options = {"method": "static", "reduce_range": False, "bias_correction": False, "split_concatenations": split}
        quantizer = StaticQuantizer(skip_graph(), examples, Int8Options.model_validate(options))
        assert quantizer.split == (["shortcut"] if split else [])
        actual = run(quantizer.quantize(), examples[0])["out"].transpose(0, 2, 3, 1).reshape(-1, 8)
        errors[split] = np.sqrt(np.square(actual - exact_output).mean())
        assert errors[split] == pytest.approx(np.sqrt(np.square(expected[split] - exact_output).mean()), rel=0.1)
    assert errors[True] < 0.1 * errors[False]


@pytest.mark.parametrize("changed", [{"groups": 2}, {"axis": 2}])
def test_what_reads_no_channels_of_one_part_alone_is_left(changed: dict[str, int]) -> None:
    weight = WEIGHT[:, : WEIGHT.shape[1] // changed.get("groups", 1)]
    model = ir.from_proto(skip_graph(weight, **changed))
    original = [node.op_type for node in model.graph]
    assert split_concatenations(model, feeds(1)) == []
    assert [node.op_type for node in model.graph] == original
