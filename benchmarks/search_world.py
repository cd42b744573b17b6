"""What recipes of the quickstart's space come to, by the trials of real searches that are kept in results/.

Quality is that of a Gaussian process through the trials, bytes and times are least squares through them. The command
`record` of `benchmarks/search.py` adds trials.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from compress.plugins.search.observations import Ledger
from compress.plugins.search.outcome import constraint_margin
from compress.plugins.search.space import INCLUDED, Point, SearchParameter, short_name
from compress.plugins.search.surrogate import Surrogate
from compress.recipe.recipe import Limit
from compress.results.report import BASELINE

TRIALS = Path(__file__).parent / "results" / "search_trials.json.gz"
KEEP = Limit(metric="accuracy", at_least=0.985, of=BASELINE)
SHARES = (1 / 9, 1 / 3, 1.0)
BY_HAND = {"prune.heads": 0.5, "prune.feed_forward": 0.75, "distill.learning_rate": 3e-4, "distill.epochs": 12,
           "distill.student.layers": [1, 3, 5], "trim_vocabulary.min_count": 1, "trim_vocabulary.characters": "seen",
           "onnx_int8.method": "dynamic", "onnx_int8.embedding_bits": 4,
           "onnx_int8.embedding_block_size": 64}  # fmt: skip
"""What people made, and how far inside the limit on accuracy it lies by its test rows."""
_INSIDE = 0.005
WIDTH, _INNER = 384, 1536
_FLOOR = -0.1
"""Further below the limit nothing is told apart."""


class Trial(NamedTuple):
    """A recorded trial, without the choices to leave stages out; ``room`` is how far inside the limit it lies."""

    point: Point
    share: float
    room: float
    size_bytes: float
    latency_ms: float | None
    parameters: float


def record(searches: Annotated[list[Path], typer.Argument(help="Folders of searches, with their ledgers.")]) -> None:
    """Keep the trials of real searches of the quickstart's space, those recorded before too."""
    kept = json.loads(gzip.decompress(TRIALS.read_bytes())) if TRIALS.is_file() else {"knobs": None, "trials": []}
    found = {(tuple(one[0]), one[1]): one for one in kept["trials"]}
    for folder in searches:
        header, entries = Ledger(folder).read(repair=False)
        fields = [place for place, (_, values) in enumerate(header.knobs) if values[0] != INCLUDED]
        parameters = json.loads(json.dumps([header.knobs[place] for place in fields]))
        if kept["knobs"] not in (None, parameters):
            raise typer.BadParameter(f"{folder} is a search of another space.")
        kept["knobs"] = parameters
        for entry in entries:
            room = None if entry.outcome.error else constraint_margin(KEEP, entry.outcome, 0.95)
            left_out = any(chosen for place, chosen in enumerate(entry.point) if place not in fields)
            if room is None or left_out:
                continue
            final, point = entry.outcome.final, tuple(entry.point[place] for place in fields)
            share = header.rungs[entry.rung]
            found[point, share] = Trial(
                point, share, room.value, final["size_bytes"], final.get("latency_ms"), final["parameters"]
            )
    kept["trials"] = [found[key] for key in sorted(found)]
    TRIALS.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))
    typer.echo(f"{len(found)} trials in {TRIALS}")


@dataclass(frozen=True)
class World:
    """What recipes of the space come to, by the trials that were recorded."""

    parameters: tuple[SearchParameter, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def recorded(cls) -> World:
        """As it is kept in results/."""
        kept = json.loads(gzip.decompress(TRIALS.read_bytes()))
        parameters = tuple(
            SearchParameter(
                name,
                tuple(values),
                int(name.split(".")[1]),
                is_after_training=short_name(name).startswith(("trim", "onnx_int8")),
            )
            for name, values in kept["knobs"]
        )
        return cls(parameters, tuple(Trial(tuple(one[0]), *one[1:]) for one in kept["trials"]))

    def of(self, point: Point) -> dict[str, Any]:
        """Values by the short names of their fields."""
        return {
            short_name(parameter.name): parameter.values[chosen]
            for parameter, chosen in zip(self.parameters, point, strict=True)
        }

    @cached_property
    def by_hand(self) -> Point:
        return tuple(parameter.values.index(BY_HAND[short_name(parameter.name)]) for parameter in self.parameters)

    def matrices(self, point: Point) -> tuple[int, float, float]:
        """Layers, and the parameters of attention and of feed-forward in all of them."""
        chosen = self.of(point)
        layers = len(chosen["distill.student.layers"])
        attention = layers * 4 * WIDTH**2 * (1 - chosen["prune.heads"])
        return layers, attention, layers * 2 * WIDTH * _INNER * (1 - chosen["prune.feed_forward"])

    def weights(self, point: Point) -> float:
        """Parameters of all layers' matrices."""
        return sum(self.matrices(point)[1:])

    def share_of_weights(self, point: Point) -> float:
        return self.weights(point) / self.weights((0,) * len(point))

    @cached_property
    def _tokens(self) -> dict[tuple[Any, ...], float]:
        """Of each vocabulary that was made."""
        found: dict[tuple[Any, ...], list[float]] = {}
        for one in self.trials:
            found.setdefault(self._trimmed(one.point), []).append((one.parameters - self.weights(one.point)) / WIDTH)
        return {key: statistics.median(values) for key, values in found.items()}

    def _trimmed(self, point: Point) -> tuple[Any, ...]:
        chosen = self.of(point)
        return chosen["trim_vocabulary.min_count"], chosen["trim_vocabulary.characters"]

    def tokens(self, point: Point) -> float:
        """Those of its vocabulary, or of the ones with as rare tokens."""
        key = self._trimmed(point)
        alike = [count for other, count in self._tokens.items() if other[0] == key[0]]
        return self._tokens[key] if key in self._tokens else statistics.median(alike or self._tokens.values())

    def _size_terms(self, point: Point) -> list[float]:
        chosen, (layers, *_), tokens = self.of(point), self.matrices(point), self.tokens(point)
        stored = chosen["onnx_int8.embedding_bits"], chosen["onnx_int8.embedding_block_size"]
        kinds = [(bits, block) for bits in (8, 4) for block in (None, 64)]
        return [1.0, self.weights(point), layers, tokens, *(tokens * WIDTH * (stored == kind) for kind in kinds)]

    @cached_property
    def _bytes_each(self) -> np.ndarray:
        return _least_squares(
            [self._size_terms(one.point) for one in self.trials], [one.size_bytes for one in self.trials]
        )

    def size_bytes(self, point: Point) -> float:
        return float(np.dot(self._bytes_each, self._size_terms(point)))

    @cached_property
    def _milliseconds_each(self) -> np.ndarray:
        timed = [(one.point, one.latency_ms) for one in self.trials if one.latency_ms is not None]
        return _least_squares([[1.0, *self.matrices(point)] for point, _ in timed], [ms for _, ms in timed])

    def latency_ms(self, point: Point) -> float:
        return float(np.dot(self._milliseconds_each, [1.0, *self.matrices(point)]))

    def _features(self, point: Point, share: float) -> list[float]:
        chosen, kept = self.of(point), self.share_of_weights(point)
        found = {
            short_name(parameter.name): parameter.ranks()[value]
            for parameter, value in zip(self.parameters, point, strict=True)
        }
        found["prune.heads"] = -math.log2(1 - chosen["prune.heads"]) / 2
        found["prune.feed_forward"] = -math.log2(1 - chosen["prune.feed_forward"]) / 3
        trained = max(math.log(chosen["distill.epochs"] * share / 3 * kept), -4) / 2
        size = math.log(self.size_bytes(point) / self.size_bytes((0,) * len(point)))
        return [*found.values(), size, kept, trained, math.log(share) / math.log(SHARES[0])]

    @cached_property
    def _process(self) -> Surrogate:
        features = np.array([self._features(one.point, one.share) for one in self.trials])
        rooms = np.maximum([one.room for one in self.trials], _FLOOR)
        lesser = [*(parameter.is_after_training for parameter in self.parameters), True, False, False, False]
        return Surrogate.fit(features, rooms, np.full(len(rooms), 0.003), 0.02, lesser)

    def _expected(self, point: Point, share: float) -> float:
        return float(self._process.mean(np.array([self._features(point, share)]))[0])

    @cached_property
    def _offset(self) -> float:
        """What makes of the recipe by hand what it is: a process leans towards the mean of what was tried."""
        return _INSIDE - self._expected(self.by_hand, 1.0)

    def room(self, point: Point, share: float, seed: int) -> float:
        """How far inside the limit on accuracy it lies in truth, in the world of a seed."""
        chance = 0.005 * normal(seed, "trained", point[:5]) + 0.002 * normal(seed, "stored", point)
        return self._expected(point, share) + self._offset + chance

    def stages(self, point: Point, share: float) -> dict[tuple[object, ...], float]:
        """Seconds of each, as they were on two cores, by what they are a function of."""
        chosen, kept = self.of(point), self.share_of_weights(point)
        epochs = round(chosen["distill.epochs"] * share, 3)
        base = self.share_of_weights(self.by_hand)
        trained = {
            ("prune", point[:2]): 1.0,
            ("distill", point[:5], epochs): epochs / 12 * (40 + 150 * kept / base),
        }
        quantized = 3.0 + 6.0 * (chosen["onnx_int8.method"] == "static")
        trimmed = {(name, point[:7], epochs): 4.0 for name in ("trim_vocabulary", "onnx")}
        return trained | trimmed | {("onnx_int8", point, epochs): quantized}


def _least_squares(terms: list[list[float]], values: Sequence[float]) -> np.ndarray:
    """Of relative errors."""
    relative = np.array(terms) / np.array(values)[:, None]
    found: np.ndarray = np.linalg.lstsq(relative, np.ones(len(values)), rcond=None)[0]
    return found


def normal(*seed: object) -> float:
    """A number from the standard normal distribution that depends on ``seed`` alone."""
    return random.Random(hashlib.sha256(repr(seed).encode()).digest()).gauss(0, 1)
