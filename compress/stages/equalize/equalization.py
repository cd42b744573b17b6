"""Equalizing a checkpoint block by block: the same function, in weights that few bits hold better.

A factor on the inputs of linear layers can be taken back in the norm or the layer that makes them. Nothing here knows
an architecture: candidates come from watching which module's output is which layer's input, and from sizes; each is
tried on the block itself with random factors, and what changes the block's output is no fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import refuse_quantized
from compress.models.hooks import capture_inputs, capture_outputs
from compress.numerics.int8_activations import smoothing_factors
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import CalibrationActivations, calibration_sequences
from compress.stages.blockwise.write import write_floats
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError

TOKENS = 16


def equalize_checkpoint(
    checkpoint: Checkpoint, strength: float, context: Context, text: Quantization | None = None
) -> Checkpoint:
    """Write the equalized checkpoint into the scratch folder; changed tensors are stored in float32.

    With ``text``, whose windows are read then, ``strength`` is SmoothQuant's alpha. Raises `StageError` where nothing
    could be equalized, `DataError` for too little text, and `ModelError` as `build_blockwise_model` does.
    """
    refuse_quantized(checkpoint.folder)
    decoder, stream = build_blockwise_model(checkpoint), None
    if text is not None:
        ids = calibration_sequences(context, checkpoint, text.samples, text.sequence_length)
        context.scratch.mkdir(parents=True, exist_ok=True)
        stream = CalibrationActivations(decoder, text, ids, context.scratch)
    work = _Work(decoder, strength, context, stream)
    equalized = write_floats(checkpoint, context.scratch / "equalized", work.tensors())
    context.note(work.summary())
    return equalized


def probe(decoder: BlockwiseModel, index: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Hidden states [1, TOKENS, hidden] to try a loaded block on, and its forward pass."""
    call = decoder.calls(torch.arange(TOKENS)[None] % decoder.vocabulary)[index]
    generator = torch.Generator().manual_seed(index)
    hidden = torch.randn(1, TOKENS, decoder.hidden_size, generator=generator)
    return hidden, lambda states: decoder.run(index, states, call)


@dataclass
class _Work:
    decoder: BlockwiseModel
    strength: float
    context: Context
    stream: CalibrationActivations | None = None
    folds: int = 0
    alone: list[str] = field(default_factory=list)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of changed layers."""
        blocks = range(len(self.decoder.blocks))
        for index in self.context.progress.track(blocks, "equalizing blocks", len(blocks)):
            yield from self._block(index)
        if self.stream is not None:
            self.stream.forget(len(blocks))
        if not self.folds:
            raise StageError(
                "Nothing could be equalized: no norm or layer makes the inputs of a linear layer alone.",
                expected="an architecture such as Llama, Qwen, Mistral, Gemma or Phi",
                hint="leave the stage out",
            )

    def _block(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        block, prefix = self.decoder.load(index), f"{self.decoder.prefix}.{index}"
        modules = {name: part for name, part in block.named_modules() if name}
        largest = {} if self.stream is None else _largest_inputs(self.stream, index, modules)
        hidden, run = probe(self.decoder, index)
        config, width = self.decoder.model.config.get_text_config(), self.decoder.hidden_size
        head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        folds, alone = find_folds(modules, lambda: run(hidden), head_size)
        self.folds += len(folds)
        self.alone += [f"{prefix}.{name}" for name in alone]
        # All factors are found before any weight changes.
        for fold, factors in [(fold, self._factors(fold, modules, largest)) for fold in folds]:
            fold.scale(modules, factors)
            fold.take_back(modules, factors)
        changed = {name for fold in folds for name in (*fold.consumers, fold.source)}
        for name in sorted(changed):
            yield from self.decoder.as_stored(f"{prefix}.{name}", modules[name])
        self.decoder.unload(index)

    def _factors(
        self, fold: Fold, modules: dict[str, torch.nn.Module], largest: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        weights = [modules[name].get_parameter("weight").data for name in fold.consumers]
        if self.stream is None:
            return equalizing(weights, self.strength, fold.places)
        inputs = largest[fold.consumers[0]].numpy()
        factors = smoothing_factors(inputs, [weight.T.numpy() for weight in weights], self.strength)
        return share(torch.from_numpy(factors).log(), fold.places)

    def summary(self) -> str:
        """Return a line on the changed layers and those left as they are."""
        left = f"; unchanged: {len(self.alone)} layers such as {self.alone[0]}" if self.alone else ""
        done = "alike columns" if self.stream is None else "smoother inputs"
        return f"equalize: {self.folds} groups of layers with {done}{left}"


def _largest_inputs(stream: CalibrationActivations, index: int, modules: Modules) -> dict[str, torch.Tensor]:
    """Return the largest magnitude of each input of a loaded block's linear layers, [columns], over all sequences."""
    maxima: dict[str, torch.Tensor] = {}

    def seen(name: str, values: torch.Tensor) -> None:
        largest = values.detach().flatten(0, -2).abs().amax(0).float()
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    layers = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
    stream.pass_watched(index, layers, seen)
    stream.forget(index)
    return maxima


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
            modules[name].get_parameter("weight").data.mul_(factors)

    def take_back(self, modules: Modules, factors: torch.Tensor) -> None:
        """Divide the source's outputs by ``factors``, which are equal where columns share a place; in place."""
        outputs = torch.ones(int(self.places.max()) + 1).index_copy_(0, self.places, factors)
        for leaf, parameter in modules[self.source].named_parameters(recurse=False):
            lift = float(self.around_one and leaf == "weight")
            divisor = outputs if parameter.ndim == 1 else outputs[:, None]
            parameter.data.add_(lift).div_(divisor).sub_(lift)


@torch.no_grad()
def find_folds(modules: Modules, run: Run, head_size: int) -> tuple[list[Fold], list[str]]:
    """Return the folds among the ``modules`` of a block by name, and the linear layers that have none.

    ``run`` gives the block's output on some input.
    """
    groups, makers = _watch(modules, run)
    output_before = run()
    folds: list[Fold] = []
    alone: list[str] = []
    for consumers, columns, value in groups:
        candidates = _candidates(modules, consumers, makers.get(value), columns, head_size)
        fold = next((fold for fold in candidates if _holds(fold, modules, run, output_before)), None)
        if fold is None:
            alone.extend(consumers)
        else:
            folds.append(fold)
    return folds, alone


def _watch(modules: Modules, run: Run) -> tuple[list[tuple[tuple[str, ...], int, int]], dict[int, str]]:
    """Return the linear layers that share an input, with its width and identity, and which module made which output."""
    readers: dict[int, list[str]] = {}
    makers: dict[int, str] = {}
    held: dict[int, torch.Tensor] = {}  # else an identity might be given to another tensor

    def reads(name: str, values: torch.Tensor) -> None:
        held[id(values)] = values
        readers.setdefault(id(values), []).append(name)

    def makes(name: str, values: torch.Tensor) -> None:
        held[id(values)] = values
        makers[id(values)] = name

    linears = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
    others = {name: part for name, part in modules.items() if name not in linears and [*part.parameters(recurse=False)]}
    with capture_inputs(linears, reads), capture_outputs(others, makes):
        run()
    return [(tuple(names), held[value].shape[-1], value) for value, names in readers.items()], makers


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
    """Return whether factors on the consumers, which change the output, cancel once they are folded back."""
    generator = torch.Generator().manual_seed(0)
    factors = share(0.5 * torch.randn(len(fold.places), generator=generator), fold.places)
    names = (*fold.consumers, fold.source)
    copies = [(part, part.data.clone()) for name in names for part in modules[name].parameters(recurse=False)]
    fold.scale(modules, factors)
    effect = float((run() - before).abs().max())
    fold.take_back(modules, factors)
    left = float((run() - before).abs().max())
    for parameter, original in copies:
        parameter.data = original
    return left < _TOLERANCE * effect


def equalizing(weights: Sequence[torch.Tensor], strength: float, places: torch.Tensor) -> torch.Tensor:
    """Return a factor for each column of ``weights`` [rows, columns] with a shared input: size to the power -strength.

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
