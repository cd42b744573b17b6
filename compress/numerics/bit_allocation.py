"""Choice of one option per unit with minimal total loss under a budget of bits: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_CHOICES = 4_000_000


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its size and its loss of quality."""

    size_bits: int
    loss: float


def allocate_bits(units: Sequence[Sequence[Option]], budget_bits: int) -> tuple[int, ...]:
    """Return the index of each unit's option in the choice with the least total loss within ``budget_bits``.

    The solution is exact. Partial choices are extended unit by unit. One is dropped when another is no larger and no
    worse, or when even the linear relaxation of the remaining units (Sinha and Zoltners 1979, section 2) cannot bring
    it below a known choice. Among equal losses the smaller size wins, then the earlier options.

    Raises:
        ValueError: If no choice fits the budget (the message contains the minimum), a loss is not finite, or losses are
            so nearly proportional to sizes that too many partial choices remain.
    """
    _check(units, budget_bits)
    # Options that another option of the unit dominates can never be part of the solution.
    frontiers: list[Frontier] = []
    for unit_options in units:
        unit_sizes = np.array([option.size_bits for option in unit_options], np.int64)
        unit_losses = np.array([option.loss for option in unit_options], np.float64)
        indices = _undominated(unit_sizes, unit_losses)
        frontiers.append((unit_sizes[indices], unit_losses[indices], indices))
    least = [int(sizes[0]) for sizes, _, _ in frontiers]
    steps = _hull_steps(frontiers)
    bound = _greedy_loss(frontiers, steps, budget_bits)
    # Rounding of sums must not drop the best choice; what is let through only takes longer.
    ceiling = bound + 1e-9 * (1 + abs(bound) + sum(float(np.abs(losses).max()) for _, losses, _ in frontiers))
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for unit, (unit_sizes, unit_losses, indices) in enumerate(frontiers):
        count = len(unit_sizes)
        # Combine every partial choice with every option of the unit.
        sizes = (sizes[:, None] + unit_sizes).ravel()
        losses = (losses[:, None] + unit_losses).ravel()
        # Reserve the minimum for the remaining units.
        room = budget_bits - sizes - sum(least[unit + 1 :])
        # The least loss of the units from ``first`` on if hull steps could be divided.
        first = unit + 1
        ours = steps.units >= first
        filled = np.concatenate([[0.0], np.cumsum(steps.sizes[ours])])
        saved = np.concatenate([[0.0], np.cumsum(steps.savings[ours])])
        start = sum(float(losses[0]) for _, losses, _ in frontiers[first:])
        # With divisible steps the optimum takes them in order of efficiency.
        remaining_loss: np.ndarray = start - np.interp(room, filled, saved)
        survivors = np.flatnonzero((room >= 0) & (losses + remaining_loss <= ceiling))
        # Of the choices that can still win, keep those that no other one dominates.
        survivors = survivors[_undominated(sizes[survivors], losses[survivors])]
        if len(survivors) > _MOST_CHOICES:
            raise ValueError(f"after {unit + 1} of {len(units)} units {len(survivors)} partial choices are as good")
        # Remember parents and options to reconstruct the choice.
        trail.append((survivors // count, indices[survivors % count]))
        sizes, losses = sizes[survivors], losses[survivors]
    state = int(np.lexsort((sizes, losses))[0])
    chosen: list[int] = []
    # Follow the parents from the last unit to the first.
    for parents, options in reversed(trail):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return tuple(reversed(chosen))


Frontier = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Sizes (ascending), losses (descending) and indices of the options that no other option of the unit dominates."""


def _check(units: Sequence[Sequence[Option]], budget_bits: int) -> None:
    for index, options in enumerate(units):
        if not options:
            raise ValueError(f"unit {index} has no option")
        for option in options:
            if not np.isfinite(option.loss) or option.size_bits < 0:
                raise ValueError(f"unit {index} has an option of {option.size_bits} bits and loss {option.loss}")
    least = sum(min(option.size_bits for option in options) for options in units)
    if least > budget_bits:
        raise ValueError(f"a budget of {budget_bits} bits fits no choice: the least possible is {least} bits")


def _undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return positions, by size, of options with a smaller loss than all no larger ones; the first of equals."""
    order = np.lexsort((losses, sizes))
    sorted_losses = losses[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    return np.asarray(order[sorted_losses < best_before])


@dataclass(frozen=True)
class _Steps:
    """Steps along the lower convex hulls of all units, ordered by loss saved per bit, largest first."""

    units: np.ndarray
    sizes: np.ndarray
    savings: np.ndarray


def _hull_steps(frontiers: Sequence[Frontier]) -> _Steps:
    units, sizes, savings = [], [], []
    for unit, (unit_sizes, unit_losses, _) in enumerate(frontiers):
        hull: list[int] = []
        for point in range(len(unit_sizes)):
            # Drop points above the line between their neighbours.
            while len(hull) > 1 and _slope(unit_sizes, unit_losses, *hull[-2:]) <= _slope(
                unit_sizes, unit_losses, hull[-1], point
            ):
                hull.pop()
            hull.append(point)
        units += [unit] * (len(hull) - 1)
        sizes += np.diff(unit_sizes[hull]).tolist()
        savings += (-np.diff(unit_losses[hull])).tolist()
    columns = np.array(units, np.int64), np.array(sizes, np.float64), np.array(savings, np.float64)
    order = np.argsort(-columns[2] / columns[1], kind="stable")
    return _Steps(*(column[order] for column in columns))


def _slope(sizes: np.ndarray, losses: np.ndarray, left: int, right: int) -> float:
    """Return the loss saved per bit between two options."""
    return float((losses[left] - losses[right]) / (sizes[right] - sizes[left]))


def _greedy_loss(frontiers: Sequence[Frontier], steps: _Steps, budget_bits: int) -> float:
    """Return the loss of a good choice: hull steps in order while they fit; a unit stops at the first that does not."""
    room = budget_bits - sum(int(sizes[0]) for sizes, _, _ in frontiers)
    loss = sum(float(losses[0]) for _, losses, _ in frontiers)
    stopped: set[int] = set()
    for unit, size, saving in zip(steps.units.tolist(), steps.sizes.tolist(), steps.savings.tolist(), strict=True):
        # Skipping a step of a unit would make its later steps invalid.
        if unit in stopped or size > room:
            stopped.add(unit)
            continue
        room, loss = room - int(size), loss - saving
    return loss
