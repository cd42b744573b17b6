"""The network of `fashion-conv-qat.yaml`: convolutions with batch normalisation and ReLU, no residuals."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def build(classes: int = 10, width: int = 16) -> nn.Module:
    """Pixels [batch, 1, 28, 28] to logits [batch, classes]; five convolutions, ``width`` to 4 x ``width`` channels."""
    return nn.Sequential(
        OrderedDict(
            first=_convolution(1, width),
            second=_convolution(width, width),
            halve=nn.MaxPool2d(2),
            third=_convolution(width, 2 * width),
            fourth=_convolution(2 * width, 2 * width),
            halve_again=nn.MaxPool2d(2),
            fifth=_convolution(2 * width, 4 * width),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(4 * width, classes),
        )
    )


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
