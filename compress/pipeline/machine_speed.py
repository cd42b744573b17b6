"""How fast this machine computes."""

from __future__ import annotations

import time

from compress.utils.environment import cores_quota, granted_cores

_FEWEST_ROUNDS = 5


def machine_flops_per_second(budget_seconds: float = 0.02) -> float:
    """The best rate of an fp32 matrix product on one core within ``budget_seconds``, times the cores granted.

    The matrices are the largest that OpenBLAS multiplies in one thread (2^18 multiplications): several stall each other
    where other work goes on, or a container grants fewer cores than it shows, and are a thousand times as slow then.
    """
    import numpy as np

    size = 64
    left = np.full((size, size), 0.5, dtype=np.float32)
    left @ left  # the first product sets its library up, which may take longer than the whole budget
    rounds: list[float] = []
    end = time.perf_counter() + budget_seconds
    while time.perf_counter() < end or len(rounds) < _FEWEST_ROUNDS:
        start = time.perf_counter()
        for _ in range(8):
            left @ left
        rounds.append(time.perf_counter() - start)
    cores = min(len(granted_cores()), cores_quota() or float("inf"))
    return 8 * 2 * size**3 / min(rounds) * max(cores, 1)
