"""How many parameters a model has and of which sort: what the cost of a stage depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Parameters by sort, and the sizes that memory depends on (0 where they are not known).

    ``processor_bytes``: tokenizer and other files beside the weights; ``matrix_bits``, ``table_bits``: of a weight of
    the matrices and of the embedding tables, as earlier stages left them; ``packed_bytes``: the size of files that are
    laid out otherwise.
    """

    embeddings: float
    attention: float
    feed_forward: float
    other: float
    layers: int
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    processor_bytes: int = 0
    matrix_bits: int = 32
    table_bits: int = 32
    packed_bytes: int | None = None

    @property
    def parameters(self) -> float:
        """All parameters."""
        return self.embeddings + self.working

    @property
    def working(self) -> float:
        """Parameters that multiply every token: all but the embedding tables."""
        return self.attention + self.feed_forward + self.other

    def in_bits(self, matrices: int, tables: int) -> Shape:
        """The same with weights of so many bits."""
        return replace(self, matrix_bits=matrices, table_bits=tables)

    def first_token_only(self) -> Shape:
        """What multiplies a token where the last layer gives the first one alone: there, what makes keys and values."""
        layers = max(self.layers, 1)
        shares = {
            "attention": self.attention * (1 - 0.5 / layers),
            "feed_forward": self.feed_forward * (1 - 1 / layers),
        }
        return replace(self, **shares)

    def with_layers(self, layers: int) -> Shape:
        """The same with as many layers, all of them alike."""
        share = layers / self.layers if self.layers else 1.0
        return replace(self, layers=layers, attention=self.attention * share, feed_forward=self.feed_forward * share)
