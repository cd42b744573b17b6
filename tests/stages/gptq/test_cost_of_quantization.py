"""What the plan says of `gptq`, against flops that torch counts and the files that the stage writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import context, save_decoder, some_ids
from torch.utils.flop_counter import FlopCounterMode

from compress.pipeline.recipe_sources import read_shape
from compress.stages.blockwise.block_pass import BlockPass
from compress.stages.blockwise.blockwise_model import build_blockwise_model
from compress.stages.blockwise.cost import (
    checkpoint_bytes,
    quantization_flops,
    quantization_memory_bytes,
    survey_flops,
)
from compress.stages.blockwise.layers import linears, plan_layers
from compress.stages.cost_model import Shape
from compress.stages.gptq.bit_allocation import Survey
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.stages.gptq.token_weighting import Gradients
from compress.utils.progress import SilentProgress
from compress.utils.storage import size_bytes


def test_flops_of_forward_passes_and_hessians_are_those_that_torch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Panels as narrow, beside these small sides, as they are beside large ones.
    monkeypatch.setattr("compress.stages.blockwise.block_pass._PANEL", 8)
    checkpoint, ids = save_decoder(tmp_path), some_ids(4, 16)
    decoder = build_blockwise_model(checkpoint)
    hidden, calls = decoder.embedded(ids), decoder.calls(ids)
    counted = 0
    for index in range(2):
        modules = linears(decoder.load(index), f"model.layers.{index}")
        run = partial(decoder.run, index, call=calls[index])
        work = BlockPass("block", modules, run, [lambda hidden=hidden: hidden])
        with torch.no_grad():
            groups = work._groups()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            hidden = work._solve_at_once(hidden, groups, lambda names, hessian: None)
        products = counter.get_flop_counts()["Global"]
        counted += sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    config = Quantization(samples=4, sequence_length=16, guided=False)
    shape = read_shape(tmp_path)
    solver = 2 * 2 * (2 * 64 * 64 * 64 + 2 * 32 * 64 * 64 + 2 * 96 * 64 * 64 + 64 * 96 * 96)
    # Norms are counted as parameters and multiply nothing; a Hessian's diagonal panels are multiplied out in full.
    assert quantization_flops(config, shape) - solver == pytest.approx(counted, rel=0.2)


def test_flops_of_weighing_tokens_are_those_that_torch_counts(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path / "model"), some_ids(4, 16)
    plain, guided = (Quantization(samples=4, sequence_length=16, guided=guided) for guided in (False, True))
    work = Gradients(build_blockwise_model(checkpoint), guided, ids, tmp_path / "work", SilentProgress())
    with FlopCounterMode(display=False) as counter:
        work.importance()
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    shape = read_shape(checkpoint.folder)
    # The Hessians that layers no longer share are no part of it.
    apart = 4 * 16 * 2 * 3 * 64**2
    expected = quantization_flops(guided, shape) - quantization_flops(plain, shape) - apart
    assert expected == pytest.approx(counted, rel=0.1)


def test_flops_of_measuring_sensitivity_are_those_that_torch_counts(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path / "model"), some_ids(1, 16)
    config = Quantization(samples=1, sequence_length=16, group_size=32, target_bits=4.5, choices=(2, 4, 8))
    decoder = build_blockwise_model(checkpoint)
    (tmp_path / "work").mkdir()
    survey = Survey(decoder, config, plan_layers(decoder, config), (2, 4, 8), SilentProgress(), tmp_path / "work")
    with FlopCounterMode(display=False) as counter:
        survey.run(ids, {}, lambda hessian: {})
    products = counter.get_flop_counts()["Global"]
    counted = sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    assert survey_flops(config, read_shape(checkpoint.folder)) == pytest.approx(counted, rel=0.15)
    assert survey_flops(Quantization(), read_shape(checkpoint.folder)) == 0


def test_flops_and_memory_by_hand() -> None:
    shape = Shape(embeddings=1e6, attention=8e6, feed_forward=12e6, other=0, layers=2, hidden=100, intermediate=300)
    config = Quantization(samples=10, sequence_length=20, guided=False)
    forward, hessians = 2 * 20e6 * 200, 200 * 2 * (3 * 100**2 + 300**2)
    solver = 2 * (16e6 * 100 + 4e6 * 300)
    assert quantization_flops(config, shape) == forward + hessians + solver
    block, squares = 4 * 10e6, 4 * 4 * 300**2
    assert quantization_memory_bytes(config, shape) == block + squares + 4 * 4 * 200 * 300 + 2 * 4 * 200 * 100
    guided = Quantization(samples=10, sequence_length=20)
    apart = 200 * 2 * (6 * 100**2 + 300**2)
    assert quantization_flops(guided, shape) == 4 * forward + 4 * 1e6 * 200 + apart + solver
    assert quantization_memory_bytes(guided, shape) == quantization_memory_bytes(config, shape)
    # The logits of one long window, three times: 100,000 x 10,000 values of four bytes; and states of 100,000 x 100.
    long = Quantization(samples=1, sequence_length=100_000)
    assert quantization_memory_bytes(long, shape) == 3 * 4 * 100_000 * 10_000 + 2 * 4 * 100_000 * 100
    nearest = Quantization(method="rtn")
    assert quantization_flops(nearest, shape) == 0
    assert quantization_memory_bytes(nearest, shape) == 2 * block


@pytest.mark.parametrize("fields", [{}, {"embedding_bits": 4}, {"bits": 8, "group_size": -1}])
def test_the_folder_is_about_as_large_as_foretold(fields: dict[str, Any], tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", hidden_size=128, intermediate_size=256, vocab_size=1000)
    config = {"group_size": 32, "samples": 4, "sequence_length": 24, **fields}
    result = Gptq(**config).run(source, context(tmp_path / "scratch"))
    written = sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    shape = read_shape(source.folder)
    foretold = checkpoint_bytes(Quantization(**config), shape) - shape.processor_bytes
    assert foretold == pytest.approx(written, rel=0.06)
    assert size_bytes(result.folder) > written
