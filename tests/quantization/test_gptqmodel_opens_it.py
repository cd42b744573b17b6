"""A foreign client: transformers with gptqmodel loads the checkpoint as it is, and answers what its integers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import context, save_decoder, some_ids
from gptqmodel_environment import run_there
from safetensors.torch import load_file, save_file

from compress.checkpoints.checkpoint import QuantizedCheckpoint
from compress.quantization.build import logits
from compress.stages.gptq import Gptq

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "gptqmodel_opens.py"

CASES: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32, "embedding_bits": 4},
    {"bits": 4, "group_size": 64, "sym": False},
    {"bits": 8, "group_size": -1},
    {"bits": 2, "group_size": 32},
    {"bits": 3, "group_size": 32},
    {"bits": 4, "group_size": 32, "keep": ("*.o_proj",)},
    # Mixed bits: transformers reads no `dynamic`, gptqmodel does.
    {"group_size": 32, "target_bits": 5.0, "embedding_bits": 4, "choices": (2, 4, 8)},
]
MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3MoeConfig", {"bits": 4, "group_size": 32}),
    ("Qwen2MoeConfig", {"group_size": 32, "target_bits": 5.5, "choices": (2, 4, 8)}),
]
"""Opened by gptqmodel, which takes the fused experts of transformers apart as we do; transformers alone doesn't."""


def checkpoint(folder: Path, fields: dict[str, Any]) -> QuantizedCheckpoint:
    source = save_decoder(
        folder / "source", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    )
    return Gptq(samples=6, sequence_length=32, **fields).run(source, context(folder / "scratch"))


def test_each_opens_unmodified(tmp_path: Path) -> None:
    made = [checkpoint(tmp_path / str(index), fields) for index, fields in enumerate(CASES)]
    openers = ["gptqmodel" if "target_bits" in fields else "transformers" for fields in CASES]
    assert opened(tmp_path, made, openers, CASES) == [integer_layers(one) for one in made]


def test_mixtures_of_experts_open_unmodified(tmp_path: Path) -> None:
    made = []
    for config, fields in MIXTURES:
        source = save_decoder(tmp_path / config / "source", config, hidden_size=128)
        stage = Gptq(samples=6, sequence_length=32, **fields)
        made.append(stage.run(source, context(tmp_path / config / "scratch")))
    # Of two experts that are all but equal to a router, half precision may choose the other.
    found = opened(tmp_path, made, ["gptqmodel"] * len(made), [fields for _, fields in MIXTURES], share=0.5)
    assert found == [integer_layers(one) for one in made]


def integer_layers(checkpoint: QuantizedCheckpoint) -> int:
    return sum(name.endswith(".qweight") for name in checkpoint.files)


def opened(
    folder: Path,
    made: list[QuantizedCheckpoint],
    openers: list[str],
    cases: list[dict[str, Any]],
    share: float = 1.0,
) -> list[int]:
    """Have each opened there, and compare its answers to a share of tokens; how many integer layers each has there."""
    ids = some_ids(2, 20)
    save_file({"ids": ids}, folder / "ids.safetensors")
    jobs = [f"{opener}={one.folder}" for opener, one in zip(openers, made, strict=True)]
    printed = run_there(SCRIPT, str(folder / "ids.safetensors"), *jobs)
    modules = json.loads(printed.splitlines()[-1])
    counts = []
    for fields, one in zip(cases, made, strict=True):
        kernels = modules[str(one.folder)]
        assert all("gptqmodel" in module for module in kernels)
        counts.append(sum(kernels.values()))
        found, expected = load_file(one.folder.with_suffix(".logits"))["logits"], logits(one, ids)
        # Half precision through two blocks; an integer that is off by one shows ten times as much.
        near = (found - expected).abs().amax(-1) < 0.03 * float(expected.abs().max())
        near &= torch.nn.functional.cosine_similarity(found, expected, dim=-1) > 0.9995
        # A wrong integer would show in the first token already, which no other token's router has touched.
        assert float(near.float().mean()) >= share and bool(near[:, 0].all()), (fields, near)
    return counts
