"""What a search will vary, before it runs anything: its choices, their values, and where its recipe comes from."""

from __future__ import annotations

from collections.abc import Iterator

from compress.plugins.search.goal import Goal
from compress.plugins.search.parameters import written
from compress.plugins.search.space import Space
from compress.report.limits import limit_text
from compress.results.formatting import format_seconds
from compress.utils.pydantic_models import Frozen


class Choice(Frozen):
    """A field, or a stage that may be left out: its value in the recipe as it stands, and the others."""

    name: str
    own: str
    others: tuple[str, ...]


class Opening(Frozen):
    """A space before it is searched. ``origin`` says where the recipe comes from, ``refused`` what cannot be tried."""

    name: str
    origin: str
    task: str
    model: str
    stages: tuple[str, ...]
    baseline: str
    minimize: tuple[str, ...]
    limits: tuple[str, ...]
    target: str
    rows: int
    budget: str
    choices: tuple[Choice, ...]
    size: int
    refused: dict[str, str] = {}
    past: tuple[str, ...] = ()
    first_seconds: float = 0.0
    """What the stages of the first trial will take, as far as that is foretold."""
    budget_seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.name}: begins with {self.origin}: {' -> '.join(self.stages)}, compared with {self.baseline}"
        within = ", ".join(self.limits) or "no limits"
        yield f"{' and '.join(self.minimize)} minimized on {self.target}, within {within}"
        yield f"chosen by {self.rows:,} rows held out of training, in {self.budget}"
        yield f"{self.size:,} recipes from {len(self.choices)} choices:"
        for one in self.choices:
            yield f"  {one.name}: {one.own}; or {', '.join(one.others)}"
        for why in dict.fromkeys(self.refused.values()):
            yield f"  left out: {', '.join(name for name, own in self.refused.items() if own == why)}: {why}"
        if self.first_seconds > self.budget_seconds:
            yield (
                f"the first trial alone is foretold to take {format_seconds(self.first_seconds)}, longer than the "
                f"budget of {self.budget}: with no more time nothing else will be tried"
            )
        if self.past:
            yield f"where to look first is said by {', '.join(self.past)}"


def opening_of(
    space: Space, goal: Goal, target: str, origin: str, past: tuple[str, ...], first_seconds: float
) -> Opening:
    """Everything that is known of a space."""
    base = space.base
    return Opening(
        name=base.name,
        origin=origin,
        task=base.task,
        model=base.model,
        stages=space.labels,
        baseline=base.baseline,
        minimize=goal.minimize,
        limits=tuple(f"{limit.metric} {limit_text(limit)}" for limit in goal.limits),
        target=target,
        rows=space.search.select.rows,
        budget=space.search.budget,
        choices=tuple(
            Choice(name=knob.name, own=written(knob.values[0]), others=tuple(map(written, knob.values[1:])))
            for knob in space.knobs
        ),
        size=space.size,
        refused=space.refused,
        past=past,
        first_seconds=first_seconds,
        budget_seconds=space.search.seconds,
    )
