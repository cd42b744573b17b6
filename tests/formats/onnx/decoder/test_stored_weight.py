"""Quantized weights in the kernels' bytes, against the kernels themselves and against bytes packed by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.stored_weight import StoredWeight, join_planes, pack, split_planes, stack, store
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def weight(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    middle = torch.full((rows, groups), 1 << (bits - 1))
    zeros = middle if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return QuantizedWeight(
        integers=torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8),
        scales=(torch.rand(rows, groups, generator=generator) + 0.1).half().float(),
        zero_points=zeros.to(torch.uint8),
        bits=bits,
        group_size=group_size,
    )


def kernel(operator: str, stored: StoredWeight, given: np.ndarray, **attributes: int) -> np.ndarray:
    """What ONNX Runtime's kernel gives for ``given`` and the stored weight."""
    integers = stored.integers() if operator == "MatMulNBits" else stored.integers().reshape(stored.rows, -1)
    stores = {"b": integers, "s": stored.scales.astype(np.float32)}
    zeros = stored.packed_zero_points()
    stores |= {} if zeros is None else {"z": zeros}
    order = ["x", "b", "s", "z"] if operator == "MatMulNBits" else ["b", "x", "s", "z"]
    node = helper.make_node(
        operator,
        [name for name in order if name == "x" or name in stores],
        ["y"],
        domain="com.microsoft",
        bits=stored.kernel_bits,
        block_size=stored.block_size,
        **attributes,
    )
    kind = FLOAT if given.dtype == np.float32 else INT64
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, given.shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stores.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {"x": given})[0]
    return outputs


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "columns", "group_size"),
    [(2, 64, 32), (3, 128, 64), (4, 96, 32), (4, 192, 96), (5, 64, 16), (6, 96, 96), (7, 64, 64), (8, 576, 576)],
)
def test_the_kernels_read_the_same_weights(bits: int, columns: int, group_size: int, symmetric: bool) -> None:
    quantized = weight(24, columns, bits, group_size, symmetric)
    stored = store(quantized, "w")
    expected = quantized.dequantize().numpy()
    rows = np.eye(columns, dtype=np.float32)
    actual = kernel("MatMulNBits", stored, rows, K=columns, N=24, accuracy_level=1)
    np.testing.assert_allclose(actual.T, expected, rtol=1e-6, atol=1e-6)
    picked = np.array([[5, 0, 23]])
    looked_up = kernel("GatherBlockQuantized", stored, picked, gather_axis=0, quantize_axis=1)
    np.testing.assert_allclose(looked_up, expected[picked], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_that_fills_no_block_is_padded(symmetric: bool) -> None:
    quantized = weight(8, 72, 4, 32, symmetric)
    stored = store(quantized, "w")
    assert stored.integers().shape == (8, 3, 16)
    actual = kernel("MatMulNBits", stored, np.eye(72, dtype=np.float32), K=72, N=8, accuracy_level=1)
    np.testing.assert_allclose(actual.T, quantized.dequantize().numpy(), rtol=1e-6, atol=1e-6)


def test_low_bits_come_first() -> None:
    assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(np.array([[1, 2, 3, 0, 3]], np.uint8), 2).tolist() == [[0b00111001, 0b11]]
    assert pack(np.array([[7, 200]], np.uint8), 8).tolist() == [[7, 200]]


def test_symmetric_weights_store_no_zero_points_and_three_bits_move_to_the_middle_of_four() -> None:
    stored = store(weight(4, 32, 3, 32, symmetric=True), "w")
    assert stored.zero_points is None
    assert stored.kernel_bits == 4
    low = stored.integers() & 15
    assert low.min() >= 4
    assert low.max() <= 11
    assert store(weight(4, 32, 3, 32, symmetric=False), "w").zero_points is not None


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planes_hold_no_bit_more_and_are_joined_again(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (5, 32)).astype(np.uint8)
    planes = split_planes(values, bits)
    assert sum(plane.nbytes for plane in planes) == 5 * 32 * bits // 8
    nodes = GraphBuilder()
    graph_inputs = [nodes.input(f"p{index}", ir.DataType.UINT8, plane.shape) for index, plane in enumerate(planes)]
    nodes.output(join_planes(nodes, "w", graph_inputs, bits, (5, 32)), "y", ir.DataType.UINT8, [5, 32])
    session = onnxruntime.InferenceSession(ir.to_proto(nodes.model("planes")).SerializeToString())
    actual = session.run(None, {f"p{index}": plane for index, plane in enumerate(planes)})[0]
    np.testing.assert_array_equal(actual, values)


def test_planes_by_hand() -> None:
    # 5 bits: the low four of values that lie 4 apart share a byte, then the fifth of all eight.
    values = np.array([[1, 2, 3, 4, 16, 31, 8, 0]], np.uint8)
    low, high = split_planes(values, 5)
    assert low.tolist() == [[[0x01, 0xF2, 0x83, 0x04]]]
    assert high.tolist() == [[[0b00110000]]]


def test_stacked_rows_are_those_of_each() -> None:
    parts = [weight(rows, 64, 4, 32, False, seed) for seed, rows in enumerate((3, 5))]
    both = stack([store(part, "w") for part in parts])
    actual = kernel("MatMulNBits", both, np.eye(64, dtype=np.float32), K=64, N=8, accuracy_level=1)
    expected = np.concatenate([part.dequantize().numpy() for part in parts])
    np.testing.assert_allclose(actual.T, expected, rtol=1e-6, atol=1e-6)


def test_weights_of_other_bits_blocks_or_zero_points_do_not_join() -> None:
    first = store(weight(4, 64, 4, 32, True), "w")
    others = [weight(4, 64, 8, 32, True), weight(4, 64, 4, 16, True), weight(4, 64, 4, 32, False)]
    assert first.can_stack(store(weight(9, 64, 4, 32, True), "w"))
    assert not any(first.can_stack(store(other, "w")) for other in others)


def test_groups_that_no_block_fits_are_refused() -> None:
    with pytest.raises(ModelError, match="Groups of 24") as error:
        store(weight(4, 48, 4, 24, True), "model.layers.0.mlp.up_proj")
    assert error.value.where == "model.layers.0.mlp.up_proj"
