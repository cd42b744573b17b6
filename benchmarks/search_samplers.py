"""The search engine compared with Optuna's samplers on replays of the same recorded trials (`search_replay.py`).

All methods know the predicted sizes: a recipe is never run if its predicted size is not below the size of the best
recipe that meets all limits so far. All methods start from the same recipe and train every later one in full, except
that the engine may train in part first.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import typer
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import create_trial
from search_page import Write, show
from search_replay import BOUNDS, TABLE, RecordedTrials, engine_trials, load_recorded, sample_rows, size_goal

from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import Goal
from compress.plugins.search.space import Point

SAMPLES = Path(__file__).parent / "results" / "search_samplers.json.gz"
BUDGET = 0.25
"""Share of the cost of running every recipe after which a search has to return its pick."""
ENGINE, RANDOM = "engine", "random"


def samplers(
    table: Annotated[Path, typer.Option(help="File that `collect` wrote.")] = TABLE,
    seeds: Annotated[int, typer.Option(help="Replays for each bound.")] = 25,
    startup: Annotated[str, typer.Option(help="Random trials before a sampler's model is used.")] = "10,4,2",
    bounds: Annotated[str, typer.Option(help="Shares of the baseline's accuracy to keep.")] = BOUNDS,
    output: Annotated[Path, typer.Option(help="File for the result of every replay.")] = SAMPLES,
    write: Write = False,
) -> None:
    """Replay searches with the engine, GPSampler, TPESampler and random search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    recorded = load_recorded(table)
    methods = [ENGINE, *(f"{name} {n}" for n in startup.split(",") for name in ("GPSampler", "TPESampler")), RANDOM]
    results = []
    for bound in map(float, bounds.split(",")):
        for seed in range(seeds):
            for method in methods:
                result = replay_method(method, sample_rows(recorded, seed), size_goal(bound), seed)
                if result is not None:
                    results.append({"method": method, "bound": bound, "seed": seed, **result})
            typer.echo(f"{bound:.0%}, seed {seed}", err=True)
    output.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
    columns, rows, notes = _summarize(results, methods)
    show("The search engine and Optuna's samplers", columns, rows, write, notes=notes)


def replay_method(method: str, trials: RecordedTrials, goal: Goal, seed: int) -> dict[str, Any] | None:
    """Replay one search until the budget is spent and the best recipe was found.

    Args:
        method: `engine`, `random`, or the name of a sampler and its number of random trials.
        trials: Recorded trials with the selection rows of this replay.
        goal: Objective and limits.
        seed: Seed of the method.

    Returns:
        The cost until the best recipe was found, whether a recipe that meets all limits is returned within the budget,
        and whether that recipe meets the limit on fresh rows too; None where no recipe meets the limits.
    """
    best, best_bytes = trials.best(goal)
    if best is None:
        return None
    engine = Engine(trials, trials, goal, trials.shares, seed) if method == ENGINE else None
    if engine is not None:
        observations, planned = engine.observations, engine_trials(engine)
    else:
        observations = Observations(goal, trials.full_rung, trials.origin)
        planned = _random_trials(trials, observations, seed) if method == RANDOM else _sampled_trials(
            trials, observations, _sampler(method, seed)
        )  # fmt: skip
    total, cost, pick, is_over = trials.exhaustive_seconds, None, None, False
    for trial in planned:
        outcome = trials.run(trial)
        if not is_over and trials.spent_seconds > BUDGET * total:
            # A trial that is not complete within the budget does not count.
            pick, is_over = observations.best(), True
        if engine is not None:
            engine.record(trial, outcome)
        else:
            observations.add(trial.point, trial.rung, outcome)
        is_full = trial.rung == trials.full_rung
        if cost is None and is_full and goal.meets_limits(outcome):
            cost = trials.spent_seconds / total if outcome.final["size_bytes"] <= best_bytes * 1.01 else None
        if is_over and cost is not None:
            break
    pick = pick if is_over else observations.best()
    bound = goal.limits[0].bound
    return {
        "cost": cost,
        "returned": pick is not None,
        "met_on_fresh_rows": pick is not None and trials.accuracy_ratio_on_fresh_rows(pick) >= bound,
    }


def _sampler(method: str, seed: int) -> BaseSampler:
    name, startup = method.split()
    if name == "GPSampler":
        return GPSampler(seed=seed, n_startup_trials=int(startup))
    return TPESampler(seed=seed, n_startup_trials=int(startup), multivariate=True)


def _permitted(trials: RecordedTrials, observations: Observations) -> list[Point]:
    """Return the recipes that were not run and are predicted to be smaller than the best so far."""
    best = observations.best()
    limit = float("inf") if best is None else observations.feasible[best][0]
    return [
        point
        for point in trials.points(0)
        if point not in observations.finished and (trials.predict(point, "size_bytes") or 0.0) < limit
    ]


def _random_trials(trials: RecordedTrials, observations: Observations, seed: int) -> Iterator[PlannedTrial]:
    chosen = random.Random(seed)
    yield PlannedTrial(trials.origin, trials.full_rung)
    while permitted := _permitted(trials, observations):
        yield PlannedTrial(chosen.choice(permitted), trials.full_rung)


def _sampled_trials(trials: RecordedTrials, observations: Observations, sampler: BaseSampler) -> Iterator[PlannedTrial]:
    """Yield the proposals of a sampler; in place of one that is not permitted, the nearest that is."""
    study = optuna.create_study(sampler=sampler)
    distributions: dict[str, BaseDistribution] = {}
    order: dict[str, list[int]] = {}
    for parameter in trials.parameters:
        count = len(parameter.values)
        if parameter.is_ordered:
            order[parameter.name] = sorted(range(count), key=parameter.values.__getitem__)
            distributions[parameter.name] = IntDistribution(0, count - 1)
        else:
            distributions[parameter.name] = CategoricalDistribution(list(range(count)))

    def to_params(point: Point) -> dict[str, int]:
        pairs = zip(distributions, point, strict=True)
        return {name: order[name].index(index) if name in order else index for name, index in pairs}

    def distance(first: dict[str, int], second: dict[str, int]) -> float:
        return sum(
            abs(first[name] - second[name]) / (len(order[name]) - 1)
            if name in order
            else float(first[name] != second[name])
            for name in distributions
        )

    point = trials.origin
    yield PlannedTrial(point, trials.full_rung)
    while True:
        outcome = observations.finished[point]
        shortfalls = {name: min(value, 1.0) for name, value in observations.goal.shortfalls(outcome).items()}
        study.add_trial(
            create_trial(
                params=to_params(point),
                distributions=distributions,
                value=outcome.final["size_bytes"],
                constraints=shortfalls,
            )
        )
        permitted = _permitted(trials, observations)
        if not permitted:
            return
        proposal = study.ask(distributions)
        # The trial is added again with its constraints once its outcome is known.
        study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        params = proposal.params
        point = min(permitted, key=lambda candidate: (distance(to_params(candidate), params), candidate))
        yield PlannedTrial(point, trials.full_rung)


def _summarize(
    results: Sequence[dict[str, Any]], methods: Sequence[str]
) -> tuple[tuple[str, ...], list[list[str]], list[str]]:
    """Return columns, rows and notes of the results table."""
    costs: dict[str, list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for result in results:
        method = result["method"]
        cost = float("inf") if result["cost"] is None else result["cost"]
        costs[method].append(cost)
        costs[f"{method} {result['bound']}"].append(cost)
        for name in ("returned", "met_on_fresh_rows"):
            counts[method, name] += result[name]
    bounds = sorted({result["bound"] for result in results})
    engine, replays = np.array(costs[ENGINE]), len(costs[ENGINE])
    samples = np.random.default_rng(0).integers(0, replays, (2000, replays))
    rows = []
    for method in methods:
        # Replays of all methods are in the same order, so that they are resampled in pairs.
        ratios = np.median(engine[samples], axis=1) / np.median(np.array(costs[method])[samples], axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        rows.append(
            [
                method,
                *(f"{statistics.median(costs[f'{method} {bound}']):.1%}" for bound in bounds),
                f"{statistics.median(costs[method]):.1%}",
                f"{statistics.median(costs[ENGINE]) / statistics.median(costs[method]):.2f} ({low:.2f}-{high:.2f})",
                f"{counts[method, 'returned']} of {replays}",
                f"{counts[method, 'met_on_fresh_rows']}",
            ]
        )
    columns = (
        "method",
        *(f"median cost, {bound:.0%} of the accuracy" for bound in bounds),
        "all",
        "engine / this (95%)",
        f"meets all limits at {BUDGET:.0%} of the cost",
        "on fresh rows too",
    )
    notes = [
        "`python benchmarks/search.py samplers --seeds 25 --write` on 2 cores (AMD EPYC); optuna " + optuna.__version__,
        "The number counts random trials before the sampler uses its model; Optuna's default is 10. The others "
        "were tried afterwards, in favour of the samplers.",
        "No method runs a recipe whose predicted size is not below that of the best recipe so far. Intervals are "
        "paired bootstraps over replays.",
    ]
    return columns, rows, notes
