"""Training of a quantized block: weights with their rounding, scales and norms, towards the float block's output.

Block-AP of EfficientQAT (Chen et al. 2024, section 3.2). The block's input is the output of the quantized blocks
before it, and its target is the float model's output at this point, so it compensates for their errors too.
Training starts from the solver's integers. Weights are trained in steps of their grid; scales, norms and biases
relative to their initial value, so that the same learning rates suit blocks of any size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.models.quantized_module import StoredPrecision
from compress.numerics.fake_quantization import dequantize, stored_as, straight_through
from compress.numerics.integer_grid import QuantizedWeight, as_float16
from compress.stages.blockwise.calibration import BlockRun, States
from compress.stages.gptq.settings import BlockTraining
from compress.stages.training.length import Length

_WARM_UP = 0.05
_SCALE_LEARNING_RATE = 2e-3
"""Peak change of a scale, norm or bias in a step, relative."""
_EPSILON = 1e-15
"""Epsilon of AdamW, far below its default, since gradients of single weights are tiny."""
_WITHIN = 0.49
"""Distance in steps to which a weight is clamped around an integer, so that it is rounded to that integer."""


class LearnedIntegers(nn.Module):
    """Parametrization of a weight by ``steps`` [rows, columns] of its grid, counted from the zero point, and by scales.

    The weight is the nearest integers of the grid times the scales, which are rounded to float16 as in the file.
    """

    start: torch.Tensor
    zero_points: torch.Tensor

    def __init__(self, quantized: QuantizedWeight) -> None:
        super().__init__()
        self.quantized, self.symmetric = quantized, quantized.symmetric
        self.bits, self.group_size = quantized.bits, quantized.group_size
        self.start, self.zero_points = quantized.scales.float(), quantized.zero_points.float()
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    def scales(self) -> torch.Tensor:
        """Return the scales [rows, groups] as float32, each a value that float16 can hold."""
        return stored_as(self.start * self.log_ratio.exp(), torch.float16)

    def integers(self, steps: torch.Tensor) -> torch.Tensor:
        """Return the integers nearest to ``steps`` within the grid, minus their zero points; the gradient passes."""
        return straight_through(steps, lambda exact: self._clamped(exact.round()))

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """Return the weight that the rounded ``steps`` represent."""
        return dequantize(self.integers(steps), self.scales(), self.group_size, torch.float32)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the steps nearest to ``weight`` that are rounded to the solver's integers."""
        columns = torch.arange(weight.shape[1], device=weight.device) // self.group_size
        chosen = self.quantized.integers.float() - self.zero_points[:, columns]
        # Float weights that the solver rounded elsewhere are moved next to the solver's integer.
        return (weight / self.start[:, columns] - chosen).clamp_(-_WITHIN, _WITHIN).add_(chosen)

    @torch.no_grad()
    def hold(self, steps: torch.Tensor) -> None:
        """Clamp steps that left the grid, in place, since outside it their gradient would be lost."""
        self._clamped(steps, _WITHIN)

    @torch.no_grad()
    def learned(self, steps: torch.Tensor) -> QuantizedWeight:
        """Return the trained integers and scales in the form that is stored."""
        columns = torch.arange(steps.shape[1], device=steps.device) // self.group_size
        integers = self.integers(steps).add(self.zero_points[:, columns]).to(torch.uint8)
        return replace(self.quantized, integers=integers, scales=as_float16(self.scales()))

    def _clamped(self, steps: torch.Tensor, beyond: float = 0.0) -> torch.Tensor:
        """Clamp ``steps`` in place to the grid, widened by ``beyond``."""
        highest = (1 << self.bits) - 1
        if self.symmetric:
            zero = 1 << (self.bits - 1)
            return steps.clamp_(-zero - beyond, highest - zero + beyond)
        columns = torch.arange(steps.shape[1], device=steps.device) // self.group_size
        zeros = self.zero_points[:, columns]
        return steps.clamp_(-zeros - beyond, highest - zeros + beyond)


@dataclass(frozen=True)
class TrainedBlock:
    """Trained weights of a block's layers, and its norms and biases, by full name.

    ``before`` and ``after`` are the errors of its outputs on held-out sequences, relative to their size. ``stopped``
    is the reason if training ended early, else empty.
    """

    weights: Mapping[str, QuantizedWeight]
    vectors: Mapping[str, torch.Tensor]
    before: float
    after: float
    stopped: str = ""

    def __str__(self) -> str:
        return f"its outputs' error on held-out text {self.before:.2%} -> {self.after:.2%}{self.stopped}"


@dataclass
class BlockTrainer:
    """Trainer of one loaded block.

    Attributes:
        name: Full name of the block.
        block: Loaded block.
        layers: Quantized layers of the block by name.
        floats: Original weights of the layers, which training takes out of the mapping.
        run: Forward pass for batches of as many sequences as a training step has.
        given: Hidden states that enter the block.
        wanted: Outputs of the float block.
        settings: Settings of the training.
        seed: Seed of the order of sequences.
        vectors: Trained norms and biases: module and parameter name by full name.
    """

    name: str
    block: nn.Module
    layers: Mapping[str, nn.Linear]
    floats: dict[str, torch.Tensor]
    run: BlockRun
    given: States
    wanted: States
    settings: BlockTraining
    seed: int
    vectors: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    @torch.enable_grad()
    def train(self, solved: Mapping[str, QuantizedWeight]) -> TrainedBlock:
        """Train from the solver's integers, and give the block the weights that were best on the held-out sequences."""
        with self._learning(solved):
            best = self._train()
        for name, weight in best.weights.items():
            self.layers[name].weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        for name, vector in best.vectors.items():
            module, leaf = self.vectors[name]
            setattr(module, leaf, nn.Parameter(vector, requires_grad=False))
        return best

    def _train(self) -> TrainedBlock:
        # The sequences to train on and those that judge the block, spread over the text.
        count, held = self.given.shape[0], self.settings.held_out
        is_trained = torch.ones(count, dtype=torch.bool)
        is_trained[torch.linspace(0, count - 1, held + 2)[1:-1].round().long()] = False
        train_rows, held_out_rows = (is_trained.nonzero()[:, 0], (~is_trained).nonzero()[:, 0])
        optimizer = torch.optim.AdamW(self._groups(), weight_decay=0.0, eps=_EPSILON, fused=True)
        epoch = math.ceil(len(train_rows) / self.settings.batch_size)
        steps = max(1, round(self.settings.epochs * epoch))
        rate = functools.partial(Length(steps).rate, warmup_ratio=_WARM_UP, decay="linear")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        generator = torch.Generator().manual_seed(self.seed)
        initial_error = self._error(held_out_rows)
        best = self._state(initial_error, initial_error)
        # Each epoch visits the sequences in a new order; the best state on held-out sequences is returned.
        for done in range(steps):
            if done % epoch == 0:
                order = train_rows[torch.randperm(len(train_rows), generator=generator)]
            # The last batch of an epoch is filled up with the first windows.
            positions = torch.arange(self.settings.batch_size) + done % epoch * self.settings.batch_size
            self._loss(order[positions % len(order)]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for layer in self.layers.values():
                # A step may move weights off the grid, where the rounding passes no gradient.
                _integers(layer).hold(_steps(layer))
            if (done + 1) % epoch == 0 or done + 1 == steps:
                error = self._error(held_out_rows)
                if not math.isfinite(error):
                    return replace(best, stopped=f"; stopped, since it became {error} in step {done + 1} of {steps}")
                if error < best.after:
                    best = self._state(initial_error, error)
        return best

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean over tokens of the squared error of the outputs, relative to their size."""
        target, output = _rows(self.wanted, windows), self.run(_rows(self.given, windows)).float()
        return ((output - target).square().mean(-1) / target.square().mean(-1).clamp(min=1e-30)).mean()

    @torch.no_grad()
    def _error(self, windows: torch.Tensor) -> float:
        return sum(float(self._loss(window)) for window in torch.split(windows, 1)) / len(windows)

    def _groups(self) -> list[dict[str, Any]]:
        steps = [_steps(layer) for layer in self.layers.values()]
        relative = [_integers(layer).log_ratio for layer in self.layers.values()]
        relative += [_learned(module, leaf) for module, leaf in self.vectors.values()]
        return [
            {"params": [parameter.requires_grad_() for parameter in steps], "lr": self.settings.learning_rate},
            {"params": [parameter.requires_grad_() for parameter in relative], "lr": _SCALE_LEARNING_RATE},
        ]

    @torch.no_grad()
    def _state(self, before: float, after: float) -> TrainedBlock:
        weights = {name: _integers(layer).learned(_steps(layer)) for name, layer in self.layers.items()}
        vectors = {name: getattr(module, leaf).detach().clone() for name, (module, leaf) in self.vectors.items()}
        return TrainedBlock(weights, vectors, before, after)

    @contextmanager
    def _learning(self, solved: Mapping[str, QuantizedWeight]) -> Iterator[None]:
        """Replace weights and vectors by parametrizations of the trained parameters while the context is open."""
        # Norm weights and biases of the block.
        names = {name: name.rpartition(".") for name, part in self.block.named_parameters() if part.ndim == 1}
        self.vectors = {
            f"{self.name}.{name}": (self.block.get_submodule(owner), leaf) for name, (owner, _, leaf) in names.items()
        }
        for name, layer in self.layers.items():
            layer.weight = nn.Parameter(self.floats.pop(name), requires_grad=False)
            parametrize.register_parametrization(layer, "weight", LearnedIntegers(solved[name]), unsafe=True)
        for module, leaf in self.vectors.values():
            vector = StoredPrecision(module.get_parameter(leaf).data, torch.float16)
            parametrize.register_parametrization(module, leaf, vector, unsafe=True)
        try:
            yield
        finally:
            for layer in self.layers.values():
                parametrize.remove_parametrizations(layer, "weight")
            for module, leaf in self.vectors.values():
                parametrize.remove_parametrizations(module, leaf)


def _learned(module: nn.Module, leaf: str) -> nn.Parameter:
    parameter: nn.Parameter = module.parametrizations[leaf].original  # type: ignore[index, union-attr]
    return parameter


def _steps(layer: nn.Linear) -> nn.Parameter:
    return _learned(layer, "weight")


def _integers(layer: nn.Linear) -> LearnedIntegers:
    parametrization: LearnedIntegers = layer.parametrizations.weight[0]  # type: ignore[index, union-attr, assignment]
    return parametrization


def _rows(states: States, windows: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[slice(window, window + 1)] for window in windows.tolist()])
