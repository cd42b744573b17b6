"""Greedy generation with whatever was opened: by the runtime's own means where it has some, else by its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from compress.runtimes.decoder import Decoder
from compress.runtimes.runtime import Session


class GreedyDecoder(Protocol):
    """Generation of one sequence, always the likeliest token."""

    @property
    def cached(self) -> bool:
        """Whether a step costs one token's work, rather than the whole sequence's."""

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary; may be 0 before the first answer."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows."""

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""


@runtime_checkable
class Generating(Protocol):
    """A session of a runtime that keeps keys and values by itself."""

    def decoder(self) -> GreedyDecoder:
        """A new generation."""


def open_decoder(session: Session, where: str) -> GreedyDecoder:
    """What generates with ``session``; ``where`` names the artifact. Raises `ModelError` for one that is no decoder."""
    return session.decoder() if isinstance(session, Generating) else Decoder(session, where)
