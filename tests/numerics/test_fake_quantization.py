"""Fake quantization: the integers are those of ONNX Runtime, bit for bit, and the gradients those of LSQ."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from compress.numerics.fake_quantization import best_row_scales, on_grid, rounded, row_scales, unsigned_grid


def quantize_linear() -> onnxruntime.InferenceSession:
    """`QuantizeLinear` of ONNX Runtime's processor, to uint8."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, [None])
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "g", inputs, [output]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = quantize_linear()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(2**-20, 2**10, width=32), st.integers(0, 255))
def test_the_integers_are_those_of_onnx_runtime(seed: int, scale: float, zero: int) -> None:
    generator = np.random.default_rng(seed)
    step = np.float32(scale)
    # Halves of a step among them, which is where rules of rounding part.
    values = np.concatenate([generator.normal(0, 90, 200), generator.integers(-400, 400, 200) + 0.5]).astype(np.float32)
    values = values * step
    (expected,) = SESSION.run(None, {"x": values, "scale": np.array(step), "zero": np.array(zero, np.uint8)})
    actual = on_grid(torch.from_numpy(values), torch.tensor(step), zero, 0, 255) + zero
    np.testing.assert_array_equal(actual.numpy(), expected.astype(np.float32))


def test_gradients_are_those_of_lsq() -> None:
    # Esser et al. 2020, equation 3: dv/ds = -v/s + round(v/s) within, -Qn below and Qp above; dv/dx = 1 within, else 0.
    values = torch.tensor([-3.0, 0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    item = torch.zeros(4)
    for index in range(4):
        actual = on_grid(values, scale, 0, -4, 7) * scale
        (item[index],) = torch.autograd.grad(actual[index], scale)
    (on_grid(values, scale, 0, -4, 7) * scale).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1, 1, 0]))
    torch.testing.assert_close(item, torch.tensor([-4.0, -0.6 + 1, -1.8 + 2, 7]))


def test_halves_are_rounded_to_even() -> None:
    assert rounded(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


def test_row_scales_bring_the_largest_weight_to_the_end() -> None:
    weight = torch.tensor([[1.0, -127.0], [0.5, 0.25], [0.0, 0.0]])
    scales = row_scales(weight, 127)
    torch.testing.assert_close(scales[:2], torch.tensor([1.0, 0.5 / 127]))
    assert scales[2] > 0, "a row of zeros has a scale that can be divided by"


def test_best_row_scales_are_no_worse_than_any_share_of_the_largest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * torch.tensor([1, 3, 0.1, 1, 1, 1])[:, None]

    def error(scale: torch.Tensor) -> torch.Tensor:
        q = (weight / scale[:, None]).round().clamp(-8, 7)
        return (q * scale[:, None] - weight).square().sum(dim=1)

    actual = error(best_row_scales(weight, 7))
    for share in np.linspace(0.3, 1, 25):
        assert bool((actual <= error(row_scales(weight, 7) * float(share)) * 1.01).all())
    assert bool((actual < error(row_scales(weight, 7)) * 0.9).any())


def test_the_grid_of_activations_holds_zero_and_both_ends() -> None:
    scale, zero = unsigned_grid(-1.0, 3.0)
    assert scale == 4 / 255 and zero == round(255 / 4)
    assert unsigned_grid(0.5, 2.0) == (2 / 255, 0)
    assert unsigned_grid(-2.0, -1.0) == (2 / 255, 255)
    assert unsigned_grid(0.0, 0.0) == (1.0, 0)
    with pytest.raises(ValueError, match="inf"):
        unsigned_grid(0.0, float("inf"))
