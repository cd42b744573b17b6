"""The parts of a pipeline as one torch module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class PipelineModule(nn.Module):
    """Children by diffusers' names; it has no answer of its own, since a picture takes many calls."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
