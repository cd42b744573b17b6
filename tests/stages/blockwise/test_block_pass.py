"""Hessians against inputs that hooks collect in transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import inputs_of_layers, module_of, save_decoder, some_ids
from torch import nn

from compress.stages.blockwise.block_pass import BlockPass, gram
from compress.stages.blockwise.blockwise_model import build_blockwise_model, last_hidden
from compress.stages.blockwise.layers import linears
from compress.utils.errors import StageError


def test_gram_is_the_mean_outer_product() -> None:
    # Two panels and a part.
    inputs = torch.randn(3, 7, 400, generator=torch.Generator().manual_seed(0))
    rows = inputs.reshape(21, 400).double()
    expected = sum(torch.outer(row, row) for row in rows) / 21
    torch.testing.assert_close(gram(inputs).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gram(inputs), gram(inputs).T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batches", [1, 3])
def test_hessians_are_those_of_the_layers_inputs(batches: int, tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path), some_ids(6, 10)
    expected = inputs_of_layers(module_of(checkpoint), ids)
    decoder = build_blockwise_model(checkpoint)
    hidden = decoder.embedded(ids)
    seen: dict[str, torch.Tensor] = {}
    rows = len(ids) // batches
    for index in range(2):
        modules = linears(decoder.load(index), f"model.layers.{index}")
        calls = {count: decoder.calls(ids[:count])[index] for count in (1, rows)}

        def run(given: torch.Tensor, index: int = index, calls: Any = calls) -> torch.Tensor:
            return decoder.run(index, given, calls[len(given)])

        parts = [lambda at=at, hidden=hidden: hidden[at : at + rows] for at in range(0, len(ids), rows)]
        work = BlockPass(f"block {index}", modules, run, parts)
        with torch.no_grad():
            hidden = torch.cat(list(work.solve(lambda names, hessian: seen.update(dict.fromkeys(names, hessian)))))
    assert len(seen) == 14
    for name, hessian in seen.items():
        inputs = expected[name].double()
        torch.testing.assert_close(hessian.double(), inputs.T @ inputs / len(inputs), atol=1e-4, rtol=1e-3)
    q, k, o = (seen[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q is k and q is not o
    torch.testing.assert_close(hidden, last_hidden(build_blockwise_model(checkpoint), ids), atol=1e-4, rtol=1e-4)


def test_layers_of_one_input_take_one_pass_though_tokens_count_otherwise_for_each(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path), some_ids(6, 10)
    expected = inputs_of_layers(module_of(checkpoint), ids)
    decoder = build_blockwise_model(checkpoint)
    hidden, modules = decoder.embedded(ids), linears(decoder.load(0), "model.layers.0")
    generator = torch.Generator().manual_seed(1)
    counts = {name: torch.rand(60, generator=generator) + 0.1 for name in modules}
    calls = {count: decoder.calls(ids[:count])[0] for count in (1, 2)}
    runs: list[int] = []
    seen: dict[str, torch.Tensor] = {}

    def run(given: torch.Tensor) -> torch.Tensor:
        runs.append(len(given))
        return decoder.run(0, given, calls[len(given)])

    parts = [lambda at=at: hidden[at : at + 2] for at in range(0, 6, 2)]
    work = BlockPass("block", modules, run, parts, counts=counts)
    with torch.no_grad():
        list(work.solve(lambda names, hessian: seen.update(dict.fromkeys(names, hessian))))
    # To see who reads what; then query, key and value; output; gate and up; down; and what the block gives.
    assert runs == [1] + 5 * [2, 2, 2]
    for name, weights in counts.items():
        inputs = expected[name].double()
        hessian = (inputs * weights[:, None]).T @ inputs / weights.sum()
        torch.testing.assert_close(seen[name].double(), hessian, atol=1e-4, rtol=1e-3)


class Chain(nn.Module):
    """Two layers, one after the other, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_layer_sees_what_the_quantized_layers_before_it_give(batches: int) -> None:
    chain = Chain()
    given = torch.randn(2, 5, 4)
    seen: dict[str, torch.Tensor] = {}

    def zero(names: Sequence[str], hessian: torch.Tensor) -> None:
        (name,) = names
        seen[name] = hessian
        part = chain.get_submodule(name)
        part.weight = nn.Parameter(torch.zeros_like(part.weight), requires_grad=False)

    modules = {name: part for name, part in linears(chain, "").items() if name != "idle"}
    parts = [lambda rows=rows: rows for rows in given.split(2 // batches)]
    with torch.no_grad():
        output = torch.cat(list(BlockPass("chain", modules, chain, parts).solve(zero)))
    bias = chain.first.bias.detach()
    torch.testing.assert_close(seen["second"], torch.outer(bias, bias))
    torch.testing.assert_close(output, chain.second.bias.detach().expand(2, 5, 4))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_layer_that_is_never_called_is_named(batches: int) -> None:
    chain = Chain()
    parts = [lambda: torch.randn(1, 5, 4)] * batches
    with torch.no_grad(), pytest.raises(StageError, match="never called: idle"):
        list(BlockPass("chain", linears(chain, ""), chain, parts).solve(lambda name, hessian: None))


@pytest.mark.parametrize("batches", [1, 2])
def test_inputs_that_are_not_finite_are_named(batches: int) -> None:
    chain = Chain()
    with torch.no_grad():
        chain.first.weight[0, 0] = torch.inf
    modules = {name: part for name, part in linears(chain, "").items() if name != "idle"}
    parts = [lambda: torch.randn(1, 5, 4)] * batches
    with torch.no_grad(), pytest.raises(StageError, match="inputs of second in chain hold NaN or infinite"):
        list(BlockPass("chain", modules, chain, parts).solve(lambda name, hessian: None))
