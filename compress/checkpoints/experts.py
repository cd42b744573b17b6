"""Mixtures of experts as linear layers, one for each matrix of each expert.

transformers keeps the experts of a block fused, in parameters of three dimensions. Quantization wants to see what each
matrix is given, and every file format has its integers one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

GATE, UP, DOWN = "gate", "up", "down"


def owner_of(layer: str, experts: Iterable[str]) -> str:
    """The mixture among ``experts`` that a layer belongs to, all by their full names; nothing for any other layer."""
    return next((owner for owner in experts if layer.startswith(f"{owner}.")), "")


@dataclass
class Rehearsal:
    """What experts do while their inputs are looked at, so that none of them goes without.

    An expert that the router sends fewer than ``minimum`` tokens is given all tokens of the layer besides, which weigh
    as much together as the tokens that are missing. ``sent`` [experts] is how many of all ``tokens`` go to each; as
    long as it is None, the next call is taken for the whole text. ``weights`` are those of the rows that the expert at
    work is given, or None where all count alike.

    Measured on the Mixtral of `benchmarks/train_moe.py` after 160 steps: the error of gate at 4 bits on the
    tokens that an expert is sent in other text, in millionths. After 16 tokens of its own 37 from these alone, 15 from
    all tokens of the layer, 14 from both together; after 64 tokens 16, 15 and 12; after 128, 13 and 15. Rounded to
    nearest, 1,300.
    """

    minimum: int
    sent: torch.Tensor | None = None
    tokens: int = 0
    weights: torch.Tensor | None = None

    def rows(self, expert: int, own: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
        """What an expert is given in one call: its ``own`` rows, and ``every`` row after them where they are few."""
        assert self.sent is not None
        missing = self.minimum - int(self.sent[expert])
        if missing <= 0:
            self.weights = None
            return own
        self.weights = torch.cat([torch.ones(len(own)), torch.full((len(every),), missing / self.tokens)])
        return torch.cat([own, every])


class SeparateExperts(nn.Module):
    """Experts "0", "1", ..., each of two or three linear layers on the meta device, in place of a fused module.

    ``names``: what the layers are called, by `GATE` (where there is one), `UP` and `DOWN`. ``sizes``: the number of
    experts, the width of the hidden states, and that between a layer and the next. ``activate`` makes of the outputs of
    gate and up, side by side, what enters down.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        sizes: tuple[int, int, int],
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.count, hidden, inner = sizes
        self.names = dict(names)
        self.rehearsal: Rehearsal | None = None
        self.watch: Callable[[int, torch.Tensor], None] | None = None
        """Told the number of each expert at work and its part of the result, [its tokens, hidden]."""
        self._activate = activate
        for number in range(self.count):
            expert = nn.Module()
            for role, name in names.items():
                width = (inner, hidden) if role == DOWN else (hidden, inner)
                expert.add_module(name, nn.Linear(*width, bias=False, device="meta", dtype=torch.float32))
            self.add_module(str(number), expert)

    def linear(self, expert: int, role: str) -> nn.Module:
        """One layer of an expert."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], with the router's choice [tokens, k] and its weights."""
        result = torch.zeros_like(hidden_states)
        rehearsal = self.rehearsal
        if rehearsal is not None and rehearsal.sent is None:
            rehearsal.sent, rehearsal.tokens = self.routed(top_k_index), len(hidden_states)
        for number in range(self.count):
            tokens, places = torch.where(top_k_index == number)
            rows = hidden_states[tokens]
            if rehearsal is not None:
                rows = rehearsal.rows(number, rows, hidden_states)
            if len(rows) == 0:
                continue
            part = self._expert(number, rows)[: len(tokens)] * top_k_weights[tokens, places, None]
            if self.watch is not None:
                self.watch(number, part)
            result.index_add_(0, tokens, part.to(result.dtype))
        return result

    def routed(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """How many tokens each expert is sent, [experts]."""
        return torch.bincount(top_k_index.flatten(), minlength=self.count)[: self.count]

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        beside = [self.linear(number, role)(rows) for role in (GATE, UP) if role in self.names]
        output: torch.Tensor = self.linear(number, DOWN)(self._activate(torch.cat(beside, dim=-1)))
        return output
