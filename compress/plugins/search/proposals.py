"""What Optuna would try next. It knows nothing but what it is told here, and it is told everything each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.plugins.search.parameters import Knob
from compress.plugins.search.space import Point
from compress.utils.errors import MissingExtraError


@dataclass(frozen=True)
class Told:
    """A trial as the sampler sees it: figures to minimize, and limits that are missed where they are above 0."""

    point: Point
    values: tuple[float, ...]
    constraints: Mapping[str, float]


def proposals(knobs: Sequence[Knob], told: Sequence[Told], objectives: int, seed: int, count: int) -> Iterator[Point]:
    """``count`` points worth trying, by a tree-structured Parzen estimator with constraints (Watanabe and Hutter 2023).

    The study is made anew of what is known, so that the same ledger and ``seed`` give the same proposals. They may
    repeat, and may have been tried.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "A space of more recipes than can be listed") from error
    from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {}
    order: dict[str, list[int]] = {}
    for knob in knobs:
        if knob.is_ordered:
            order[knob.name] = sorted(range(len(knob.values)), key=knob.values.__getitem__)
            distributions[knob.name] = IntDistribution(0, len(knob.values) - 1)
        else:
            distributions[knob.name] = CategoricalDistribution(list(range(len(knob.values))))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=min(8, 2 + 2 * len(knobs)))
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    for one in told:
        params = {
            knob.name: order[knob.name].index(place) if knob.name in order else place
            for knob, place in zip(knobs, one.point, strict=True)
        }
        study.add_trial(
            create_trial(
                params=params, distributions=distributions, values=one.values, constraints=dict(one.constraints)
            )
        )
    for _ in range(count):
        params = study.ask(distributions).params
        yield tuple(order[knob.name][params[knob.name]] if knob.name in order else params[knob.name] for knob in knobs)
