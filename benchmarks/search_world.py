"""Surrogate model of the quickstart's search space, fitted to trials of real searches that are stored in results/.

Accuracy is a Gaussian process on the trials; bytes and latencies are least-squares fits. The command `record` of
`benchmarks/search.py` adds trials.
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
"""The recipe written by hand."""
_BY_HAND_MARGIN = 0.005
"""Its margin to the accuracy limit on the test rows."""
WIDTH, _INNER = 384, 1536
_FLOOR = -0.1
"""Margins below this are set to it."""


class Trial(NamedTuple):
    """A recorded trial without optional stages; ``margin`` is that to the accuracy limit."""

    point: Point
    share: float
    margin: float
    size_bytes: float
    latency_ms: float | None
    parameters: float


def record(searches: Annotated[list[Path], typer.Argument(help="Folders of searches.")]) -> None:
    """Add the trials of real searches of the quickstart's space to the recorded ones."""
    recorded = json.loads(gzip.decompress(TRIALS.read_bytes())) if TRIALS.is_file() else {"knobs": None, "trials": []}
    trials = {(tuple(trial[0]), trial[1]): trial for trial in recorded["trials"]}
    for folder in searches:
        header, entries = Ledger(folder).read(repair=False)
        fields = [index for index, (_, values) in enumerate(header.knobs) if values[0] != INCLUDED]
        parameters = json.loads(json.dumps([header.knobs[index] for index in fields]))
        if recorded["knobs"] not in (None, parameters):
            raise typer.BadParameter(f"{folder} is a search of another space.")
        recorded["knobs"] = parameters
        for entry in entries:
            margin = None if entry.outcome.error else constraint_margin(KEEP, entry.outcome, 0.95)
            omits_stage = any(value for index, value in enumerate(entry.point) if index not in fields)
            if margin is None or omits_stage:
                continue
            final, point = entry.outcome.final, tuple(entry.point[index] for index in fields)
            share = header.rungs[entry.rung]
            trials[point, share] = Trial(
                point, share, margin.value, final["size_bytes"], final.get("latency_ms"), final["parameters"]
            )
    recorded["trials"] = [trials[key] for key in sorted(trials)]
    TRIALS.write_bytes(gzip.compress(json.dumps(recorded).encode(), mtime=0))
    typer.echo(f"{len(trials)} trials in {TRIALS}")


@dataclass(frozen=True)
class World:
    """Surrogate model of bytes, latency, accuracy and stage times of recipes."""

    parameters: tuple[SearchParameter, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def recorded(cls) -> World:
        """Return the model of the recorded trials."""
        recorded = json.loads(gzip.decompress(TRIALS.read_bytes()))
        parameters = tuple(
            SearchParameter(
                name,
                tuple(values),
                int(name.split(".")[1]),
                is_after_training=short_name(name).startswith(("trim", "onnx_int8")),
            )
            for name, values in recorded["knobs"]
        )
        return cls(parameters, tuple(Trial(tuple(trial[0]), *trial[1:]) for trial in recorded["trials"]))

    def values(self, point: Point) -> dict[str, Any]:
        """Return the values of a recipe by short field names."""
        return {
            short_name(parameter.name): parameter.values[chosen]
            for parameter, chosen in zip(self.parameters, point, strict=True)
        }

    @cached_property
    def by_hand(self) -> Point:
        return tuple(parameter.values.index(BY_HAND[short_name(parameter.name)]) for parameter in self.parameters)

    def matrices(self, point: Point) -> tuple[int, float, float]:
        """Return the number of layers, and the parameters of attention and of feed-forward in all layers."""
        chosen = self.values(point)
        layers = len(chosen["distill.student.layers"])
        attention = layers * 4 * WIDTH**2 * (1 - chosen["prune.heads"])
        return layers, attention, layers * 2 * WIDTH * _INNER * (1 - chosen["prune.feed_forward"])

    def weights(self, point: Point) -> float:
        """Return the number of parameters in all layers' matrices."""
        return sum(self.matrices(point)[1:])

    def share_of_weights(self, point: Point) -> float:
        return self.weights(point) / self.weights((0,) * len(point))

    @cached_property
    def _tokens(self) -> dict[tuple[Any, ...], float]:
        """Vocabulary size for each combination of trimming options in the trials."""
        sizes: dict[tuple[Any, ...], list[float]] = {}
        for trial in self.trials:
            size = (trial.parameters - self.weights(trial.point)) / WIDTH
            sizes.setdefault(self._trimming(trial.point), []).append(size)
        return {key: statistics.median(values) for key, values in sizes.items()}

    def _trimming(self, point: Point) -> tuple[Any, ...]:
        chosen = self.values(point)
        return chosen["trim_vocabulary.min_count"], chosen["trim_vocabulary.characters"]

    def tokens(self, point: Point) -> float:
        """Return the vocabulary size, or the median of those with the same minimum count if it was not recorded."""
        key = self._trimming(point)
        similar = [count for other, count in self._tokens.items() if other[0] == key[0]]
        return self._tokens[key] if key in self._tokens else statistics.median(similar or self._tokens.values())

    def _size_terms(self, point: Point) -> list[float]:
        chosen, (layers, *_), tokens = self.values(point), self.matrices(point), self.tokens(point)
        stored = chosen["onnx_int8.embedding_bits"], chosen["onnx_int8.embedding_block_size"]
        kinds = [(bits, block) for bits in (8, 4) for block in (None, 64)]
        return [1.0, self.weights(point), layers, tokens, *(tokens * WIDTH * (stored == kind) for kind in kinds)]

    @cached_property
    def _size_coefficients(self) -> np.ndarray:
        return _least_squares(
            [self._size_terms(trial.point) for trial in self.trials], [trial.size_bytes for trial in self.trials]
        )

    def size_bytes(self, point: Point) -> float:
        return float(np.dot(self._size_coefficients, self._size_terms(point)))

    @cached_property
    def _latency_coefficients(self) -> np.ndarray:
        timed = [(trial.point, trial.latency_ms) for trial in self.trials if trial.latency_ms is not None]
        return _least_squares([[1.0, *self.matrices(point)] for point, _ in timed], [ms for _, ms in timed])

    def latency_ms(self, point: Point) -> float:
        return float(np.dot(self._latency_coefficients, [1.0, *self.matrices(point)]))

    def _features(self, point: Point, share: float) -> list[float]:
        chosen, remaining = self.values(point), self.share_of_weights(point)
        features = {
            short_name(parameter.name): parameter.ranks()[value]
            for parameter, value in zip(self.parameters, point, strict=True)
        }
        features["prune.heads"] = -math.log2(1 - chosen["prune.heads"]) / 2
        features["prune.feed_forward"] = -math.log2(1 - chosen["prune.feed_forward"]) / 3
        trained = max(math.log(chosen["distill.epochs"] * share / 3 * remaining), -4) / 2
        size = math.log(self.size_bytes(point) / self.size_bytes((0,) * len(point)))
        return [*features.values(), size, remaining, trained, math.log(share) / math.log(SHARES[0])]

    @cached_property
    def _process(self) -> Surrogate:
        features = np.array([self._features(trial.point, trial.share) for trial in self.trials])
        margins = np.maximum([trial.margin for trial in self.trials], _FLOOR)
        is_minor = [*(parameter.is_after_training for parameter in self.parameters), True, False, False, False]
        return Surrogate.fit(features, margins, np.full(len(margins), 0.003), 0.02, is_minor)

    def _expected(self, point: Point, share: float) -> float:
        return float(self._process.mean(np.array([self._features(point, share)]))[0])

    @cached_property
    def _offset(self) -> float:
        """Correction for the bias of the process towards the mean: with it, the recipe by hand has its known margin."""
        return _BY_HAND_MARGIN - self._expected(self.by_hand, 1.0)

    def margin(self, point: Point, share: float, seed: int) -> float:
        """Return the true margin to the accuracy limit, with the training noise of ``seed``."""
        noise = 0.005 * normal(seed, "trained", point[:5]) + 0.002 * normal(seed, "stored", point)
        return self._expected(point, share) + self._offset + noise

    def stages(self, point: Point, share: float) -> dict[tuple[object, ...], float]:
        """Return the seconds of each stage on two cores, by a key of everything that determines its output."""
        chosen, remaining = self.values(point), self.share_of_weights(point)
        epochs = round(chosen["distill.epochs"] * share, 3)
        base = self.share_of_weights(self.by_hand)
        trained = {
            ("prune", point[:2]): 1.0,
            ("distill", point[:5], epochs): epochs / 12 * (40 + 150 * remaining / base),
        }
        quantized = 3.0 + 6.0 * (chosen["onnx_int8.method"] == "static")
        trimmed = {(name, point[:7], epochs): 4.0 for name in ("trim_vocabulary", "onnx")}
        return trained | trimmed | {("onnx_int8", point, epochs): quantized}


def _least_squares(terms: list[list[float]], values: Sequence[float]) -> np.ndarray:
    """Minimize the squared relative errors."""
    relative = np.array(terms) / np.array(values)[:, None]
    solution: np.ndarray = np.linalg.lstsq(relative, np.ones(len(values)), rcond=None)[0]
    return solution


def normal(*seed: object) -> float:
    """Return a standard normal number that only depends on ``seed``."""
    return random.Random(hashlib.sha256(repr(seed).encode()).digest()).gauss(0, 1)
