"""Networks with all kinds of channel dependencies that channel pruning must follow."""

from __future__ import annotations

from typing import Any

import tiny_images
import torch
from torch import nn
from transformers import PreTrainedConfig, RegNetConfig, RegNetForImageClassification

from compress.models.config_checks import MODULE_KEY, allow_module
from compress.models.custom_module import CustomModule
from compress.models.model import TorchModel


class Knot(nn.Module):
    """A network with every supported channel dependency.

    It has a residual sum over a grouped convolution, a depthwise convolution, squeeze-and-excitation, a concatenation
    and a flattened feature map.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.expand = nn.Conv2d(16, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(24)
        self.squeeze = nn.Conv2d(24, 8, 1)
        self.excite = nn.Conv2d(8, 24, 1)
        self.project = nn.Conv2d(24, 12, 1)
        self.slope = nn.PReLU(12)
        self.joined_norm = nn.BatchNorm2d(12 + 16)
        self.hidden = nn.Linear((12 + 16) * 16, 20)
        self.classifier = nn.Linear(20, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        stem = self.stem_norm(self.stem(pixels)).relu()
        summed = (stem + self.grouped(stem)).relu()
        wide = self.depthwise_norm(self.depthwise(self.expand(summed).relu())).relu()
        gate = self.excite(self.squeeze(wide.mean((2, 3), keepdim=True)).relu()).sigmoid()
        narrow = self.slope(self.project(wide * gate))
        both = nn.functional.adaptive_avg_pool2d(self.joined_norm(torch.cat([narrow, summed], 1)), 4)
        logits: torch.Tensor = self.classifier(self.hidden(both.flatten(1)).relu())
        return logits


class Stubborn(nn.Module):
    """A network whose channels cannot be pruned, with one exception.

    They pass group normalization, a layer that is used twice, or a product with a free parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.before = nn.Conv2d(8, 6, 1)
        self.again = nn.Conv2d(6, 6, 1)
        self.wide = nn.Conv2d(6, 10, 1)
        self.scale = nn.Parameter(torch.ones(10, 1, 1))
        self.middle = nn.Conv2d(10, 6, 1)
        self.classifier = nn.Linear(6, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        activations = self.before(self.norm(self.stem(pixels)).relu())
        activations = self.again(self.again(activations).relu())
        activations = self.middle(self.wide(activations) * self.scale).relu()
        logits: torch.Tensor = self.classifier(activations.mean((2, 3)))
        return logits


def lively(network: nn.Module, seed: int = 0) -> Any:
    """Initialize weights and batch normalization statistics at random and return the network in eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, nn.PReLU):
                nn.init.uniform_(layer.weight, 0.1, 0.4)
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.3)
                nn.init.normal_(layer.running_mean, std=0.3)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return network.eval()


def plain(network: type[nn.Module] = Knot, seed: int = 0) -> TorchModel:
    """Return the network as a custom module with a module reference in its config, so that it can be loaded again."""
    torch.manual_seed(seed)
    reference = f"{network.__module__}:{network.__name__}"
    allow_module(reference, tiny_images.Path(), {})
    config = PreTrainedConfig(**tiny_images.names(), **{MODULE_KEY: {"module": reference, "arguments": {}}})
    return TorchModel(CustomModule(lively(network(), seed), config), tiny_images.processor())


def reg_net(seed: int = 0) -> TorchModel:
    """Return a RegNet-Y of transformers, which has grouped convolutions, squeeze-and-excitation and residual sums."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8}
    config = RegNetConfig(layer_type="y", **sizes, **tiny_images.names())
    return TorchModel(lively(RegNetForImageClassification(config), seed), tiny_images.processor())
