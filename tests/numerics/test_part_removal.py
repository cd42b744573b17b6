"""Parts that go and what is left of a layer: what least squares and brute force find."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.gptq import output_error
from compress.numerics.part_removal import remove_parts

TINY = 1e-7


def inputs_of(columns: int, seed: int = 0) -> torch.Tensor:
    """[n, columns] that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(6 * columns, columns, generator=generator) @ mixed * torch.linspace(0.3, 3, columns)


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def left_out(inputs: torch.Tensor, weight: torch.Tensor, columns: list[int]) -> tuple[torch.Tensor, float]:
    """The best weight [rows, columns] of these inputs alone for what the whole layer gives, and what it still lacks."""
    some, expected = inputs.double()[:, columns], inputs.double() @ weight.double().T
    best = torch.linalg.lstsq(some, expected).solution
    return best.T.float(), float((some @ best - expected).square().sum())


def of_parts(parts: list[int], size: int) -> list[int]:
    return [part * size + index for part in parts for index in range(size)]


@pytest.mark.parametrize(("size", "count"), [(1, 7), (4, 3)])
def test_parts_go_as_brute_force_says_and_the_rest_is_fitted_by_least_squares(size: int, count: int) -> None:
    parts = 12 // size if size > 1 else 12
    inputs, weight = inputs_of(parts * size), weight_of(5, parts * size)
    left = list(range(parts))
    while len(left) > count:
        trials = {
            part: left_out(inputs, weight, of_parts([other for other in left if other != part], size))[1]
            for part in left
        }
        left.remove(min(trials, key=trials.__getitem__))
    stays, fitted = remove_parts(weight, inputs.T @ inputs / len(inputs), size, count, TINY)
    assert stays.tolist() == left
    columns = of_parts(left, size)
    torch.testing.assert_close(fitted[:, columns], left_out(inputs, weight, columns)[0], atol=1e-3, rtol=1e-3)
    gone = [column for column in range(parts * size) if column not in columns]
    assert not fitted[:, gone].any()


def test_what_others_say_too_goes_without_a_loss() -> None:
    inputs, weight = inputs_of(10), weight_of(4, 10)
    inputs[:, 3] = inputs[:, 7] - 2 * inputs[:, 1]
    hessian = inputs.T @ inputs
    stays, fitted = remove_parts(weight, hessian, 1, 9, TINY)
    assert len({1, 3, 7} & set(stays.tolist())) == 2
    assert output_error(weight, fitted, hessian) < 1e-6


def test_inputs_that_were_always_zero_go_first() -> None:
    inputs, weight = inputs_of(10), weight_of(4, 10)
    inputs[:, [2, 5]] = 0
    weight[:, [2, 5]] = 100.0
    stays, fitted = remove_parts(weight, inputs.T @ inputs, 1, 8)
    assert stays.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    torch.testing.assert_close(fitted[:, stays], weight[:, stays])


def test_many_go_several_at_a_time_and_lose_little_more_than_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = inputs_of(120), weight_of(20, 120)
    hessian = inputs.T @ inputs / len(inputs)
    one_by_one = output_error(weight, remove_parts(weight, hessian, 1, 60)[1], hessian)
    monkeypatch.setattr("compress.numerics.part_removal._ROUNDS", 15)
    several = output_error(weight, remove_parts(weight, hessian, 1, 60)[1], hessian)
    largest = hessian.diagonal().argsort()[60:].sort().values
    fitted = torch.zeros_like(weight)
    fitted[:, largest] = left_out(inputs, weight, largest.tolist())[0]
    assert one_by_one < several < 1.03 * one_by_one
    assert several < output_error(weight, fitted, hessian)


@pytest.mark.parametrize("broken", ["weight", "hessian", "zero"])
def test_what_cannot_be_solved_is_said(broken: str) -> None:
    inputs, weight = inputs_of(6), weight_of(3, 6)
    hessian = inputs.T @ inputs * (broken != "zero")
    if broken != "zero":
        {"weight": weight, "hessian": hessian}[broken][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite|zero"):
        remove_parts(weight, hessian, 1, 3)
