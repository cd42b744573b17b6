"""A residual net for small images: residual sums, batch norms, a depthwise convolution, squeeze-excite."""

from __future__ import annotations

import torch
from torch import nn


def build(classes: int = 10, width: int = 32) -> nn.Module:
    """Pixels [batch, 1, 28, 28] to logits [batch, classes]; blocks of ``width`` to 4 x ``width`` channels."""
    return nn.Sequential(
        _convolution(1, width),
        nn.ReLU(),
        Block(width, width, stride=2),
        Block(width, width, stride=1),
        Block(width, 2 * width, stride=2),
        Inverted(2 * width, 4 * width),
        Block(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.second = _convolution(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, stride, kernel=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        return (self.second(self.first(inputs).relu()) + self.shortcut(inputs)).relu()


class Inverted(nn.Module):
    """Wider in between, each channel filtered alone and weighed by its mean (Howard et al. 2019, figure 4)."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.expand = _convolution(width, wider, kernel=1)
        self.filter = _convolution(wider, wider, groups=wider)
        self.squeeze = nn.Conv2d(wider, wider // 4, 1)
        self.excite = nn.Conv2d(wider // 4, wider, 1)
        self.project = _convolution(wider, width, kernel=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[batch, width, height, width] to the same shape."""
        wide = self.filter(self.expand(inputs).relu()).relu()
        weights = self.excite(self.squeeze(wide.mean((2, 3), keepdim=True)).relu()).sigmoid()
        narrow: torch.Tensor = self.project(wide * weights)
        return inputs + narrow


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))
