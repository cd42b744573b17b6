"""A product with a stored head, against torch's own product and gradient."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import language_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_and_its_gradient_are_those_of_a_plain_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # More rows than fit at a time, and a last part that is smaller.
    monkeypatch.setattr(language_head, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 12, generator=generator).to(dtype)
    slope = torch.randn(2, 5, 30, generator=generator)
    ours = torch.randn(2, 5, 12, generator=generator).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    product, expected = language_head.head_product(ours, weight), plain @ weight.float().T
    torch.testing.assert_close(product, expected)
    product.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_under_autocast_it_is_in_bfloat16_and_the_gradient_is_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language_head, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 12, generator=generator).bfloat16()
    hidden = torch.randn(5, 12, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        product = language_head.head_product(hidden, weight)
    assert product.dtype == torch.bfloat16
    slope = torch.randn(5, 30, generator=generator).bfloat16()
    product.backward(slope)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(hidden.grad, slope.float() @ weight.float(), atol=0.05, rtol=0.02)
