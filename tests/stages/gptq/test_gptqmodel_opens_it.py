"""Tests with a foreign client: transformers with gptqmodel loads the checkpoint and matches the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from decoders import context, save_decoder, some_ids
from foreign_environments import GPTQMODEL
from rotation import is_todays
from safetensors.torch import load_file, save_file

from compress.models.checkpoint import QuantizedCheckpoint
from compress.stages.blockwise.blockwise_model import logits
from compress.stages.gptq.stage import Gptq

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


@pytest.mark.skipif(not is_todays("gptqmodel"), reason="gptqmodel is begun every fourth day")
def test_gptqmodel_opens_each_checkpoint_unmodified(tmp_path: Path) -> None:
    """One process opens all checkpoints, since its start takes longer than opening them."""
    jobs: list[Job] = []
    for index, fields in enumerate(CASES):
        opener = "gptqmodel" if "target_bits" in fields else "transformers"
        jobs.append(Job(opener, checkpoint(tmp_path / str(index), fields), 1.0))
    for config, fields in MIXTURES:
        source = save_decoder(tmp_path / config / "source", config, hidden_size=128)
        stage = Gptq(samples=6, sequence_length=32, **fields)
        # Of two experts with nearly equal router logits, half precision may choose the other.
        jobs.append(Job("gptqmodel", stage.run(source, context(tmp_path / config / "scratch")), 0.5))
    ids = some_ids(2, 20)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    printed = GPTQMODEL.run(
        SCRIPT, str(tmp_path / "ids.safetensors"), *(f"{job.opener}={job.made.folder}" for job in jobs)
    )
    modules = json.loads(printed.splitlines()[-1])
    for job, fields in zip(jobs, [*CASES, *(fields for _, fields in MIXTURES)], strict=True):
        kernels = modules[str(job.made.folder)]
        assert all("gptqmodel" in module for module in kernels)
        assert sum(kernels.values()) == integer_layers(job.made)
        near = nearness(job.made, ids)
        # A wrong integer would already show in the first token, which no other token's routing affects.
        assert float(near.float().mean()) >= job.share and bool(near[:, 0].all()), (fields, near)


class Job(NamedTuple):
    """A way to open a checkpoint, and the required share of equal predicted tokens."""

    opener: str
    made: QuantizedCheckpoint
    share: float


def integer_layers(checkpoint: QuantizedCheckpoint) -> int:
    return sum(name.endswith(".qweight") for name in checkpoint.files)


def nearness(made: QuantizedCheckpoint, ids: torch.Tensor) -> torch.Tensor:
    """Return for each token whether both logits agree, [rows, tokens]."""
    found, expected = load_file(made.folder.with_suffix(".logits"))["logits"], logits(made, ids)
    # Half precision through two blocks; an integer off by one would deviate ten times as much.
    near = (found - expected).abs().amax(-1) < 0.03 * float(expected.abs().max())
    return near & (torch.nn.functional.cosine_similarity(found, expected, dim=-1) > 0.9995)
