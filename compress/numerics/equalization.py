"""Columns of alike size, so that the weights which share a scale fill its range: factors on a layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def equalizing(weights: Sequence[torch.Tensor], strength: float, places: torch.Tensor) -> torch.Tensor:
    """A factor for each column of ``weights`` [rows, columns], which share their input: size to the power -strength.

    The size of a column is its root mean square over all rows; columns of zeros keep a factor of 1. ``places`` as in
    `share`. With the inputs divided by the same factors this is cross-layer equalization (Nagel et al. 2019, section
    4.1), of the consuming side alone, since each row has scales of its own on the other.
    """
    sizes = torch.cat(list(weights)).square().mean(0).sqrt()
    live = sizes > 0
    logs = torch.where(live, sizes, 1.0).log()
    logs = torch.where(live, logs - logs[live].mean(), 0.0)
    return share(-strength * logs, places)


def share(logs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Factors [columns] from their logarithms, equal where ``places`` [columns] are: the geometric mean of each place.

    Their own geometric mean is 1.
    """
    outputs = int(places.max()) + 1
    sums = torch.zeros(outputs, dtype=logs.dtype).index_add_(0, places, logs)
    means = (sums / torch.bincount(places, minlength=outputs).clamp(min=1))[places]
    return (means - means.mean()).exp()
