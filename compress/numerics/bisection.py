"""The fewest of a ranking that must be given up until something holds."""

from __future__ import annotations

from collections.abc import Callable


def fewest(count: int, holds: Callable[[int], bool], go_on: Callable[[], bool] = lambda: True) -> int:
    """The least k in 0..``count`` for which ``holds(k)``, if more never hurts; ``count`` itself holds by definition.

    Asks of 1, 2, 4 and so on first, since a few are enough most often, and bisects what is left: at most
    2 + 2 log2(k) questions. Stops with what is known to hold when ``go_on()`` is false.
    """
    if count == 0 or holds(0):
        return 0
    fails, good = 0, count
    while good - fails > 1 and go_on():
        middle = (fails + good) // 2
        if good == count:
            middle = min(middle, max(2 * fails, 1))
        if holds(middle):
            good = middle
        else:
            fails = middle
    return good
