"""Bounds that a diff is held to: `weights=0.01`, `flips=0.02`. One that noise alone may have passed is not missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from compress.plugins.diff.record import Diff, LimitFound
from compress.utils.errors import InputError, nearest_name


class _Value(NamedTuple):
    """What is bounded, with the least that it surely is."""

    value: float
    low: float


def _exact(value: float) -> _Value:
    return _Value(value, value)


def _weights(diff: Diff) -> _Value | None:
    if diff.weights is None:
        return None
    whole = diff.weights.added or diff.weights.removed or diff.weights.resized
    return _exact(max([one.unexplained for one in diff.weights.tensors] + ([1.0] if whole else []), default=0.0))


def _rounding(diff: Diff) -> _Value | None:
    return None if diff.weights is None else _exact(max((one.relative for one in diff.weights.tensors), default=0.0))


def _tensors(diff: Diff) -> _Value | None:
    if diff.weights is None:
        return None
    lists = (diff.weights.having("changed"), diff.weights.added, diff.weights.removed, diff.weights.resized)
    return _exact(sum(map(len, lists)))


def _flips(diff: Diff) -> _Value | None:
    row = diff.answers.find("agreement") if diff.answers else None
    return None if row is None else _Value(1 - row.value, 1 - (row.value if row.high is None else row.high))


def _divergence(diff: Diff) -> _Value | None:
    row = diff.answers.find("kl_divergence") if diff.answers else None
    return None if row is None else _Value(row.value, row.value if row.low is None else row.low)


def _activations(diff: Diff) -> _Value | None:
    return (
        None if diff.activations is None else _exact(max((one.error for one in diff.activations.modules), default=0.0))
    )


LIMITS: dict[str, tuple[str, Callable[[Diff], _Value | None]]] = {
    "fields": ("settings, files and recipe fields that differ", lambda diff: _exact(len(diff.fields))),
    "weights": ("largest change of a tensor that rounding doesn't explain, as a share of its size", _weights),
    "rounding": ("largest change of a tensor, rounding and all", _rounding),
    "tensors": ("tensors changed, added, removed or of another shape", _tensors),
    "flips": ("share of inputs that are answered otherwise", _flips),
    "divergence": ("mean divergence of the answers, in nats", _divergence),
    "activations": ("largest difference of a module's output over its spread", _activations),
}
"""Name -> what it bounds, and how that is read off a diff."""


def read_limits(written: Iterable[str]) -> dict[str, float]:
    """`NAME=NUMBER` each. Raises `InputError`, with the nearest name."""
    found = {}
    for one in written:
        name, _, number = one.partition("=")
        name = name.strip()
        if name not in LIMITS:
            near = nearest_name(name, LIMITS)
            hint = f"did you mean {near!r}?" if near else None
            expected = f"one of {', '.join(LIMITS)}"
            raise InputError(f"There is no limit {name!r}.", where="--at-most", expected=expected, hint=hint)
        try:
            found[name] = float(number)
        except ValueError:
            what = f"{number!r} is no number."
            raise InputError(what, where="--at-most", expected=f"such as {name}=0.01") from None
    return found


def judged(diff: Diff, limits: dict[str, float]) -> tuple[LimitFound, ...]:
    """Return the verdict of the diff on each limit."""
    return tuple(_judged(diff, name, bound) for name, bound in limits.items())


def _judged(diff: Diff, name: str, bound: float) -> LimitFound:
    found = LIMITS[name][1](diff)
    if found is None:
        return LimitFound(name=name, bound=bound, value=None, state="not measured")
    state = "kept" if found.value <= bound else "missed" if found.low > bound else "cannot tell"
    return LimitFound(name=name, bound=bound, value=found.value, state=state)
