"""Where a factor on the inputs of linear layers can be taken back: in the norm or the layer that makes them.

Nothing here knows an architecture. Candidates come from watching which module's output is which layer's input, and from
sizes; each is tried on the block itself with random factors, and what changes the block's output is no fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compress.numerics.equalization import share

_TOLERANCE = 1e-3
"""How much of a trial's effect may be left where it is taken back: what float32 loses, and no more."""

Modules = Mapping[str, nn.Module]
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """``consumers`` share an input, which ``source`` makes.

    ``places`` [columns] says which of the source's outputs each column of the input comes from: several query heads
    read one head of values. ``around_one``: the source multiplies by 1 + weight, as Gemma's norms do.
    """

    consumers: tuple[str, ...]
    source: str
    places: torch.Tensor
    around_one: bool = False

    def scale(self, modules: Modules, factors: torch.Tensor) -> None:
        """Multiply the consumers' columns by ``factors`` [columns], in place."""
        for name in self.consumers:
            _weight(modules[name]).mul_(factors)

    def take_back(self, modules: Modules, factors: torch.Tensor) -> None:
        """Divide the source's outputs by ``factors``, which are equal where columns share a place; in place."""
        outputs = torch.ones(int(self.places.max()) + 1).index_copy_(0, self.places, factors)
        for leaf, parameter in modules[self.source].named_parameters(recurse=False):
            lift = float(self.around_one and leaf == "weight")
            divisor = outputs if parameter.ndim == 1 else outputs[:, None]
            parameter.data.add_(lift).div_(divisor).sub_(lift)


@torch.no_grad()
def find_folds(modules: Modules, run: Run, head_size: int) -> tuple[list[Fold], list[str]]:
    """The folds among the ``modules`` of a block by name, and the linear layers that have none.

    ``run`` gives the block's output on some input.
    """
    groups, makers = _watch(modules, run)
    before = run()
    folds: list[Fold] = []
    alone: list[str] = []
    for consumers, columns, given in groups:
        candidates = _candidates(modules, consumers, makers.get(given), columns, head_size)
        fold = next((fold for fold in candidates if _holds(fold, modules, run, before)), None)
        if fold is None:
            alone.extend(consumers)
        else:
            folds.append(fold)
    return folds, alone


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data


def _watch(modules: Modules, run: Run) -> tuple[list[tuple[tuple[str, ...], int, int]], dict[int, str]]:
    """The linear layers that share an input, with its width and identity; and which module made what."""
    readers: dict[int, list[str]] = {}
    widths: dict[int, int] = {}
    makers: dict[int, str] = {}
    held: list[torch.Tensor] = []  # else an identity might be given to another tensor

    def reads(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            held.append(arguments[0])
            readers.setdefault(id(arguments[0]), []).append(name)
            widths[id(arguments[0])] = arguments[0].shape[-1]

        return hook

    def makes(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                held.append(output)
                makers[id(output)] = name

        return hook

    linears = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
    vectors = {
        name: part
        for name, part in modules.items()
        if name not in linears and any(True for _ in part.parameters(recurse=False))
    }
    handles = [part.register_forward_pre_hook(reads(name)) for name, part in linears.items()]
    handles += [part.register_forward_hook(makes(name)) for name, part in vectors.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [(tuple(names), widths[given], given) for given, names in readers.items()], makers


def _candidates(
    modules: Modules, consumers: tuple[str, ...], maker: str | None, columns: int, head_size: int
) -> Iterator[Fold]:
    plain = torch.arange(columns)
    if maker is not None:
        if all(parameter.shape == (columns,) for parameter in modules[maker].parameters(recurse=False)):
            yield Fold(consumers, maker, plain)
            yield Fold(consumers, maker, plain, around_one=True)
        return
    for name, part in modules.items():
        if not isinstance(part, nn.Linear) or name in consumers or columns % part.out_features:
            continue
        if part.out_features == columns:
            yield Fold(consumers, name, plain)
        elif part.out_features % head_size == 0:
            readers = columns // part.out_features
            yield Fold(consumers, name, plain // (readers * head_size) * head_size + plain % head_size)


def _holds(fold: Fold, modules: Modules, run: Run, before: torch.Tensor) -> bool:
    """Whether factors on the consumers, which do have an effect, have none once they are taken back."""
    generator = torch.Generator().manual_seed(0)
    factors = share(0.5 * torch.randn(len(fold.places), generator=generator), fold.places)
    with _as_they_are(modules, (*fold.consumers, fold.source)):
        fold.scale(modules, factors)
        effect = float((run() - before).abs().max())
        fold.take_back(modules, factors)
        left = float((run() - before).abs().max())
    return left < _TOLERANCE * effect


@contextmanager
def _as_they_are(modules: Modules, names: tuple[str, ...]) -> Iterator[None]:
    parameters = [parameter for name in names for parameter in modules[name].parameters(recurse=False)]
    copies = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data = copy
