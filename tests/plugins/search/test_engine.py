"""Tests of the search engine on synthetic spaces with known outcomes, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from search_space import RecordedSpace

from compress.plugins.search.acquisition import Acquisition
from compress.plugins.search.engine import ROUND, Engine, PlannedTrial
from compress.plugins.search.outcome import Goal, TrialOutcome, limit_name, pack_rows, unpack_rows
from compress.plugins.search.space import Point, SearchParameter
from compress.recipe.recipe import Limit, Recipe
from compress.utils.errors import InputError

ROWS = 2000
LIMIT = Limit(metric="accuracy", at_least=0.97, of="baseline")
GOAL = Goal(("size_bytes",), (LIMIT,), 0.9)
SHARES = (1 / 9, 1 / 3, 1.0)


@dataclass
class SyntheticSpace(RecordedSpace):
    """A synthetic space of layers, width, bits and kind, in which smaller models get more rows wrong."""

    seed: int = 0
    other: int = 0
    """Seed of the quality cost of layers, width, bits and kind; 0 for the costs that most tests use."""
    fails: frozenset[Point] = frozenset()
    refuses: frozenset[Point] = frozenset()
    trained: list[tuple[Point, int]] = field(default_factory=list)
    foretold: set[Point] = field(default_factory=set)
    parameters = (
        SearchParameter("stages.1.distill.student.layers", (6, 4, 3, 2, 1), 1),
        SearchParameter("stages.1.distill.width", (1.0, 0.75, 0.5, 0.25), 1),
        SearchParameter("stages.2.onnx_int8.bits", (8, 4), 2),
        SearchParameter("stages.2.onnx_int8.kind", ("a", "b"), 2),
    )

    families = 1
    """Number of leading parameters that identify a family."""

    def points(self, seed: int) -> Iterator[Point]:
        yield from itertools.product(*(range(len(parameter.values)) for parameter in self.parameters))

    def recipe(self, point: Point) -> Recipe:
        if point in self.refuses:
            raise InputError("no such recipe")
        return super().recipe(point)

    def family(self, point: Point) -> tuple[object, ...]:
        return point[: self.families]

    def tolerance(self, point: Point, metric: str) -> float:
        return 0.02

    def predict(self, point: Point, metric: str) -> float | None:
        self.foretold.add(point)
        return self.bytes(point) if metric == "size_bytes" else None

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        return self.bytes(point) * (0.85 + 0.1 * (sum(point) % 4)) if metric == "size_bytes" else None

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None: ...

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return 1 + 60 * share * self.parameters[0].values[point[0]]

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        return {f"{point} {share}": self.marginal_seconds(point, share)}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return self.marginal_seconds(point, share)

    is_enumerable = True

    def bytes(self, point: Point) -> float:
        layers, width, bits, _ = (parameter.values[at] for parameter, at in zip(self.parameters, point, strict=True))
        return 1e5 * (2 + layers * width) * bits / 8

    def wrong(self, point: Point, rung: int) -> float:
        """Return the share of rows that the baseline has right and this recipe wrong."""
        layers, width, bits, kind = (parameter.values[at] for parameter, at in zip(self.parameters, point, strict=True))
        depth, narrow, four, other = np.random.default_rng(self.other).uniform(0.6, 1.4, 4) if self.other else [1] * 4
        loss = 0.03 * depth / layers + 0.02 * narrow * (1 - width) + 0.012 * four * (bits == 4)
        loss += 0.01 * other * (kind == "b") - 0.005
        return loss * (1 + 3 * (1 - SHARES[rung]))

    def outcome(self, job: PlannedTrial) -> TrialOutcome:
        self.trained.append((job.point, job.rung))
        if job.point in self.fails:
            return TrialOutcome(error="out of memory", seconds=1.0)
        baseline = np.ones(ROWS)
        baseline[: ROWS // 8] = 0
        # All recipes lose rows in the same order.
        order = np.random.default_rng(self.seed).permutation(np.arange(ROWS // 8, ROWS))
        final = baseline.copy()
        final[order[: round(self.wrong(job.point, job.rung) * ROWS)]] = 0
        rows = {"final": {"accuracy": pack_rows([*final])}, "baseline": {"accuracy": pack_rows([*baseline])}}
        return TrialOutcome(
            final={"accuracy": float(final.mean()), "size_bytes": self.bytes(job.point)},
            baseline={"accuracy": float(baseline.mean()), "size_bytes": 1e6},
            rows=rows,
        )


def rounds(engine: Engine, made: SyntheticSpace, most: int = 10_000) -> Iterator[list[PlannedTrial]]:
    """Yield the jobs of each round, and record their outcomes before the next round."""
    while (jobs := engine.next_round()) and len(engine.observations.outcomes) < most:
        assert len(jobs) <= ROUND
        yield jobs
        for job in jobs:
            engine.record(job, made.outcome(job))


def search(made: SyntheticSpace, seed: int = 0, goal: Goal = GOAL, most: int = 10_000, **more: Any) -> Engine:
    engine = Engine(made, made, goal, SHARES, seed, **more)
    for _ in rounds(engine, made, most):
        pass
    return engine


def by_brute_force(made: SyntheticSpace, goal: Goal = GOAL) -> dict[Point, TrialOutcome]:
    every = {point: made.outcome(PlannedTrial(point, len(SHARES) - 1)) for point in made.points(0)}
    made.trained.clear()
    return {point: outcome for point, outcome in every.items() if goal.meets_limits(outcome)}


def test_search_finds_the_brute_force_optimum_at_a_fraction_of_the_cost() -> None:
    """Results are averaged over spaces with other quality costs, since recipes near the limit are decided by noise."""
    shares, bests = [], []
    for seed in range(16):
        space = SyntheticSpace(seed, other=seed)
        keeping_limits = by_brute_force(space)
        assert 5 < len(keeping_limits) < 60, "neither everything nor nothing may keep the limit"
        best = search(space, seed).observations.best()
        bests.append(best is not None and space.bytes(best) == min(map(space.bytes, keeping_limits)))
        work = sum(space.marginal_seconds(point, SHARES[rung]) for point, rung in space.trained)
        shares.append(work / sum(space.marginal_seconds(point) for point in space.points(0)))
        assert len(set(space.trained)) == len(space.trained), "nothing is done twice"
    assert sum(bests) >= 14
    assert shares[0] < 0.25 and bests[0]
    assert np.mean(shares) < 0.3


def test_resumed_search_repeats_the_same_decisions() -> None:
    """A resumed search repeats its decisions and is given the outcomes in the ledger."""
    whole = SyntheticSpace()
    search(whole)
    for stop in (5, 20):
        again = SyntheticSpace()
        engine = Engine(again, again, GOAL, SHARES, 0)
        decided: list[tuple[Point, int]] = []
        while jobs := engine.next_round():
            for job in jobs:
                decided.append((job.point, job.rung))
                assert len(decided) > stop or decided[-1] == whole.trained[len(decided) - 1]
                engine.record(job, again.outcome(job))
        assert decided == whole.trained


def test_pareto_front_equals_brute_force() -> None:
    goal = Goal(("size_bytes", "depth"), (LIMIT,), 0.9)

    class Deep(SyntheticSpace):
        def outcome(self, job: PlannedTrial) -> TrialOutcome:
            result = super().outcome(job)
            return result.model_copy(update={"final": {**result.final, "depth": float(6 - job.point[0])}})

        def predict(self, point: Point, metric: str) -> float | None:
            return float(6 - point[0]) if metric == "depth" else super().predict(point, metric)

    space = Deep()
    keeping_limits = by_brute_force(space, goal)
    known = search(space, goal=goal).observations
    values = {(space.bytes(point), 6 - point[0]) for point in keeping_limits}
    best = {mine for mine in values if not any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in values)}
    assert {goal.objectives(known.finished[point]) for point in known.pareto_front()} == best


def test_three_failures_stop_a_family_but_not_the_search() -> None:
    family = frozenset(point for point in SyntheticSpace().points(0) if point[0] == 2)
    space = SyntheticSpace(fails=family)
    engine = search(space)
    assert engine.observations.best() is not None
    assert 1 <= sum(point in family for point, _ in space.trained) <= 3 + ROUND
    assert all(
        engine.stopped[point].startswith("failed: out of memory") for point, _ in space.trained if point in family
    )


def test_failing_value_is_avoided_without_stopping_its_family() -> None:
    class OneFamily(SyntheticSpace):
        families = 0

    narrow = frozenset(point for point in SyntheticSpace().points(0) if point[1] == 3)
    space = OneFamily(fails=narrow)
    keeping_limits = by_brute_force(space)
    best = search(space).observations.best()
    assert 3 <= sum(point in narrow for point, _ in space.trained) <= 3 + 2 * ROUND
    assert best is not None and space.bytes(best) < 1.1 * min(map(space.bytes, keeping_limits))


def test_recipes_that_may_not_ship_are_never_tried() -> None:
    space = SyntheticSpace()
    search(space, may_ship=lambda point, known: not point[2])
    assert not any(point[2] for point, _ in space.trained)
    assert any(point != space.origin for point, _ in space.trained)


def test_first_timed_trials_run_one_by_one() -> None:
    space = SyntheticSpace()
    engine = Engine(space, space, Goal(("size_bytes",), (LIMIT, Limit(metric="latency_ms", at_most=1e9)), 0.9), SHARES)
    sizes = [(len(engine.observations.finished), len(jobs)) for jobs in rounds(engine, space)]
    assert all(count == 1 for finished, count in sizes if finished < 3)
    assert max(count for _, count in sizes) == ROUND


def test_invalid_points_are_reported_and_never_tried() -> None:
    refused = frozenset(point for point in SyntheticSpace().points(0) if point[1] == 1)
    space = SyntheticSpace(refuses=refused)
    engine = search(space)
    assert not refused & {point for point, _ in space.trained}
    assert set(engine.candidates.rejected) <= refused
    assert engine.candidates.rejected


def test_predicted_limit_misses_are_not_trained() -> None:
    goal = Goal(("size_bytes",), (LIMIT, Limit(metric="size_bytes", at_most=2.5e5)), 0.9)
    space = SyntheticSpace()
    search(space, goal=goal)
    assert all(space.bytes(point) <= 2.5e5 / 0.98 for point, _ in space.trained if point != space.origin)
    far = {point for point in space.points(0) if (space.predict_analytically(point, "size_bytes") or 0) * 0.75 > 2.5e5}
    assert len(far) > 20
    assert space.foretold & far <= {space.origin}


def test_recipes_likely_to_keep_a_predicted_limit_are_tried_first() -> None:
    class Timed(SyntheticSpace):
        def tolerance(self, point: Point, metric: str) -> float:
            return 0.2

        def predict(self, point: Point, metric: str) -> float | None:
            return 1.0 - 0.15 * point[3] if metric == "latency_ms" else super().predict(point, metric)

    space = Timed()
    goal = Goal(("size_bytes",), (LIMIT, Limit(metric="latency_ms", at_most=0.92)), 0.9)
    search(space, goal=goal, most=8)
    tried = [point for point, _ in space.trained if point != space.origin]
    assert all(point[3] == 1 for point in tried), "1 ms may turn out to be 0.8 ms, but 0.85 ms is likelier to be under"


def test_extreme_failures_do_not_distort_predictions() -> None:
    """Otherwise small misses would look feasible next to a recipe that loses 60% of all rows."""

    class Wrecked(SyntheticSpace):
        lost = 0.0

        def wrong(self, point: Point, rung: int) -> float:
            return self.lost if point == (4, 3, 1, 1) else super().wrong(point, rung)

    forecasts = []
    for lost in (0.2, 0.6):
        space = Wrecked()
        space.lost = lost
        engine = Engine(space, space, GOAL, SHARES, 0)
        for point in ((0, 0, 0, 0), (4, 3, 1, 1), (1, 1, 0, 0), (2, 2, 1, 0)):
            job = PlannedTrial(point, len(SHARES) - 1)
            engine.record(job, space.outcome(job))
        acquisition = Acquisition(engine.observations, space, space.parameters, SHARES)
        points = list(space.points(0))
        acquisition.rank(points)
        forecasts.append([acquisition.expected[point].probability for point in points])
    # Not exactly equal, since larger misses have wider intervals.
    assert forecasts[0] == pytest.approx(forecasts[1], abs=0.002)
    assert len({round(chance, 6) for chance in forecasts[0]}) > 20


class Slow(SyntheticSpace):
    """A space with an unpredicted latency of layers x width milliseconds."""

    def milliseconds(self, point: Point) -> float:
        layers, width = (parameter.values[at] for parameter, at in zip(self.parameters[:2], point[:2], strict=True))
        return float(layers * width)

    def outcome(self, job: PlannedTrial) -> TrialOutcome:
        result = super().outcome(job)
        return result.model_copy(update={"final": {**result.final, "latency_ms": self.milliseconds(job.point)}})


def test_unpredicted_latency_limit_is_learned_after_two_models() -> None:
    """Half of all recipes are fast enough, but over 80% of those that are timed after the first two."""
    goal = Goal(("size_bytes",), (LIMIT, Limit(metric="latency_ms", at_most=1.6)), 0.9)
    shares = []
    for seed in range(8):
        space = Slow(seed, other=seed)
        known = search(space, seed, goal, most=24).observations
        shares.append(np.mean([space.milliseconds(point) <= 1.6 for point in list(known.finished)[2:]]))
    assert np.mean(shares) > 0.8, shares


class Siblings(SyntheticSpace):
    """A space of four student depths, which decide on feasibility, and 81 ways to store each, which hardly matter."""

    parameters = (
        SearchParameter("stages.1.distill.student.layers", (12, 1, 2, 4), 1),
        *(SearchParameter(f"stages.2.onnx_int8.{name}", (0, 1, 2), 2, is_after_training=True) for name in "abcd"),
    )
    seconds, loss = (1200, 50, 100, 1000), (0.0, 0.09, 0.06, 0.0)
    """By depth: the seconds to distill the student, and its share of wrong rows."""

    def bytes(self, point: Point) -> float:
        return 1e5 * self.parameters[0].values[point[0]] * (1 - 0.01 * sum(point[1:]))

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return sum(self.remaining(point, share).values()) or 5.0

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        is_made = any(done[0] == point[0] for done, _ in self.trained)
        return {} if is_made else {f"depth {point[0]}": self.seconds[point[0]]}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return self.seconds[point[0]]

    def wrong(self, point: Point, rung: int) -> float:
        return self.loss[point[0]] + 0.002 * sum(choice == 2 for choice in point[1:])


def test_promising_depths_are_tried_before_cheap_siblings_of_misses() -> None:
    """Siblings cost a two-hundredth, but one trial shows that they all miss the limit."""
    space = Siblings()
    engine = Engine(
        space, space, Goal(("size_bytes",), (LIMIT, Limit(metric="size_bytes", at_most=5e5)), 0.9), (1.0,), 0
    )
    assert any(engine.observations.feasible for _ in rounds(engine, space, most=10)), space.trained


def test_shared_training_finishes_before_next_candidate_is_chosen() -> None:
    """Otherwise two workers would wait for the same training, whose result decides whether the second is worthwhile."""
    space, begun = Siblings(), 0
    engine = Engine(space, space, GOAL, (1.0,), 0)
    for jobs in itertools.islice(rounds(engine, space), 8):
        inputs = {point[0] for point, _ in space.trained}
        new = [job.point[0] for job in jobs if job.point[0] not in inputs]
        assert len(new) == len(set(new))
        begun += len(new)
    assert begun == 4, "all depths"


def test_largest_recipe_of_each_family_comes_first_if_origin_misses() -> None:
    """The failure of a small, cheap recipe would say little about the rest of its family."""

    class Counted(Siblings):
        def predict(self, point: Point, metric: str) -> float | None:
            parameters = 1e5 * (1 + sum(point[1:])) * (point[0] + 1)
            return parameters if metric == "parameters" else super().predict(point, metric)

    space = Counted()
    goal = Goal(
        ("size_bytes",), (Limit(metric="accuracy", at_least=0.999), Limit(metric="size_bytes", at_most=5e5)), 0.9
    )
    search(space, goal=goal, most=4)
    assert [point for point, _ in space.trained[:4]] == [space.origin, *((depth, 2, 2, 2, 2) for depth in (1, 2, 3))]


def test_nearest_recipes_are_reported_if_none_is_feasible() -> None:
    space = SyntheticSpace()
    engine = search(space, goal=Goal(("size_bytes",), (Limit(metric="accuracy", at_least=0.999),), 0.9))
    assert engine.observations.best() is engine.observations.pick() is None
    assert engine.observations.ranked() == []
    assert engine.end_reason
    short = {point: 0.999 - outcome.final["accuracy"] for point, outcome in engine.observations.finished.items()}
    assert [short[point] for point in engine.observations.by_shortfall()[:3]] == sorted(short.values())[:3]


class NoisySpace(SyntheticSpace):
    """A space in which every recipe flips 100 rows from wrong to right and 100 rows from right to wrong."""

    def outcome(self, job: PlannedTrial) -> TrialOutcome:
        result = super().outcome(job)
        final = np.array(unpack_rows(result.rows["final"]["accuracy"]))
        final[:100], final[np.flatnonzero(final)[-100:]] = 1, 0
        rows = {**result.rows, "final": {"accuracy": pack_rows([*final])}}
        return result.model_copy(update={"rows": rows, "final": {**result.final, "accuracy": float(final.mean())}})


def test_most_certain_uncertain_recipe_is_picked_if_none_is_certain() -> None:
    # The 99.999% interval of 200 flipped rows of 2,000 is wider than the accuracy loss that the limit allows.
    known = search(NoisySpace(), goal=Goal(GOAL.minimize, GOAL.limits, 0.99999)).observations
    assert known.best() is None
    inside = {
        point: rooms[limit_name(LIMIT)] for (point, rung), rooms in known.margins.items() if rung == known.full_rung
    }
    possible = {point: room.low for point, room in inside.items() if room is not None and room.value >= 0}
    assert possible
    assert known.pick() == min(possible, key=lambda point: (-possible[point], point))
    assert set(known.ranked()) == possible.keys()
    sure = search(SyntheticSpace()).observations
    assert sure.pick() == sure.best() is not None
    assert sure.ranked() == sorted(sure.feasible, key=lambda point: (sure.feasible[point], point))
    close = Limit(metric="accuracy", at_least=1.01, of="baseline")
    doubtful = search(NoisySpace(), goal=Goal(("size_bytes",), (close,), 0.99999)).observations
    assert doubtful.pick() is None
    least = doubtful.ranked()[0]
    assert doubtful.margins[least, doubtful.full_rung][limit_name(close)].high >= 0  # type: ignore[union-attr]


def test_uncertain_search_tries_recipes_that_may_be_more_certain() -> None:
    """A new depth is tried before all 81 ways to store a student that keeps the limit without certainty."""

    class Depths(NoisySpace, Siblings):
        loss = (0.0, 0.024, 0.022, 0.0)
        seconds = (1200, 50, 100, 100)

    space = Depths()
    goal = Goal(GOAL.minimize, (LIMIT, Limit(metric="size_bytes", at_most=5e5)), 0.99999)
    engine = Engine(space, space, goal, (1.0,), 0)
    assert any(point[0] == 3 for _ in rounds(engine, space, most=60) for point, _ in space.trained)
    assert engine.observations.best() is None
    picked = engine.observations.pick()
    assert picked is not None and picked[0] == 3


class Vast(SyntheticSpace):
    """The same space with so many irrelevant parameters that it cannot be enumerated."""

    parameters = (
        *SyntheticSpace.parameters,
        *(SearchParameter(f"stages.3.x.{name}", tuple(range(9)), 3) for name in "abcde"),
    )

    is_enumerable = False

    def points(self, seed: int) -> Iterator[Point]:
        drawn = np.random.default_rng(seed).integers(0, [len(knob.values) for knob in self.parameters], (200, 9))
        yield from (tuple(int(choice) for choice in row) for row in drawn)

    def bytes(self, point: Point) -> float:
        layers, width, bits = (choice.values[at] for choice, at in zip(self.parameters[:3], point[:3], strict=True))
        return 1e5 * (2 + layers * width) * bits / 8 + 100 * sum(point[4:])

    def wrong(self, point: Point, rung: int) -> float:
        return SyntheticSpace.wrong(SyntheticSpace(), point[:4], rung)


def test_large_space_is_sampled_and_optuna_proposes_points() -> None:
    space = Vast()
    engine = search(space, most=30)
    assert engine.observations.best() is not None
    drawn = set(space.points(0))
    assert any(point not in drawn for point, _ in space.trained[3:]), "some were Optuna's"
    assert space.bytes(engine.observations.best() or space.origin) < 0.6 * space.bytes(space.origin)


def test_local_search_leaves_the_sample_of_a_large_space() -> None:
    """The smallest of 5 ** 12 recipes by predicted size is tried second, although no sampled point is near it."""

    class Wide(Vast):
        parameters = tuple(
            SearchParameter(f"stages.1.distill.choice{index}", (4, 3, 2, 1, 0), 1) for index in range(12)
        )

        def points(self, seed: int) -> Iterator[Point]:
            yield from (tuple(row) for row in np.random.default_rng(seed).integers(0, 5, (200, 12)).tolist())

        families = 0

        def bytes(self, point: Point) -> float:
            return 1e5 + 1e4 * sum(parameter.values[at] for parameter, at in zip(self.parameters, point, strict=True))

        def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
            return 60.0

        def wrong(self, point: Point, rung: int) -> float:
            return 0.0

    space = Wide()
    engine = Engine(space, space, Goal(("size_bytes",), (), 0.9), (1.0,), 0)
    drawn = min(space.bytes(point) for point in space.points(0))
    _, second = itertools.islice(rounds(engine, space), 2)
    assert space.bytes(second[0].point) == space.bytes((4,) * 12) < drawn


class EvaluatedModel(SyntheticSpace):
    """A space of four parameters; an unpredicted perplexity depends on the second and the last, with an interaction."""

    parameters = tuple(SearchParameter(f"stages.1.gptq.choice{index}", (0, 1, 2, 3), 1) for index in range(4))

    families = 0

    def bytes(self, point: Point) -> float:
        return 1e6

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        # Better values take longer.
        return (100 + 30 * sum(point)) * (0.5 + 0.5 * share)

    def perplexity(self, point: Point, rung: int = 2) -> float:
        untrained = 1.5 * (1 - SHARES[rung])
        return 24 - 0.8 * point[1] - 0.5 * (point[3] == 2) - 0.3 * (point[1] * point[3] == 6) + untrained

    def outcome(self, job: PlannedTrial) -> TrialOutcome:
        self.trained.append((job.point, job.rung))
        final = {"perplexity": self.perplexity(job.point, job.rung), "size_bytes": 1e6}
        return TrialOutcome(final=final, baseline={"size_bytes": 1e6})


@pytest.mark.parametrize("seed", range(3))
def test_unpredicted_metric_is_modelled_from_earlier_trials(seed: int) -> None:
    """The first 24 trials include the best of 256 recipes or an equally good one."""
    space = EvaluatedModel(seed)
    goal = Goal(("perplexity",), (Limit(metric="size_bytes", at_most=2e6),), 0.95)
    engine = search(space, seed, goal, most=24)
    best = min(space.perplexity(point) for point in space.points(0))
    assert engine.observations.feasible[engine.observations.best() or space.origin][0] == best


def test_search_ends_when_no_improvement_is_expected() -> None:
    space = EvaluatedModel()
    engine = search(space, goal=Goal(("perplexity",), (Limit(metric="size_bytes", at_most=2e6),), 0.95))
    assert len(engine.observations.outcomes) < 200 and engine.end_reason
