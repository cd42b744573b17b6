"""The recipes by which pruning is measured: valid, and their network can lose its channels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import channel_nets
import torch

from compress.models.channel_coupling import find_couplings

FOLDER = Path(__file__).parents[2] / "benchmarks" / "pruning"


def test_every_width_of_the_network_can_be_cut() -> None:
    specification = importlib.util.spec_from_file_location("residual_net", FOLDER / "residual_net.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    network = channel_nets.lively(module.build())
    couplings, whole = find_couplings(network, lambda: network(torch.randn(2, 1, 28, 28)))
    # Stem; inner and outer widths of four blocks, two of which share a sum; expansion and squeeze in between.
    assert not whole and sorted(coupling.size for coupling in couplings) == [32, 32, 32, 32, 32, 64, 64, 128, 128, 128]
