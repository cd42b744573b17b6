"""Batch normalisation folded: the same answers, and only where the layer's output goes nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from compress.stages.qat.trainer import fold_batch_norms


class Net(nn.Module):
    """``first`` may be folded; what ``second`` gives is read past its normalisation, and ``third`` is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.third, self.third_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.first_norm(self.first(values)).relu()
        second = self.second(values)
        values = self.second_norm(second).relu() + second
        values = self.third_norm(self.third(values)).relu()
        values = self.third(values)
        out: torch.Tensor = self.last_norm(self.last(values.mean((2, 3))))
        return out


def test_normalisations_are_folded_where_that_changes_nothing() -> None:
    torch.manual_seed(0)
    net, values = Net(), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        for _ in range(5):
            net(values * 2 + 1)
        for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d)):
            norm.weight.normal_()
            norm.bias.normal_()
    net.eval()
    with torch.no_grad():
        before = net(values)
        assert fold_batch_norms(net, lambda: net(values)) == 2
        torch.testing.assert_close(net(values), before, atol=1e-4, rtol=1e-4)
    assert isinstance(net.first_norm, nn.Identity) and isinstance(net.last_norm, nn.Identity)
    assert isinstance(net.second_norm, nn.BatchNorm2d) and isinstance(net.third_norm, nn.BatchNorm2d)
    assert net.first.bias is not None and net.first.bias.requires_grad
