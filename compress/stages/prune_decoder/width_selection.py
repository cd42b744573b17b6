"""Which heads, neurons and experts of a block stay, while the calibration text passes it.

By `activation` the block passes the text as it is, and what its parts give is summed up. By `obs` the layers that read
heads and neurons are solved in the order of their calls: what goes is made up for by what stays, and the text goes on
through the block as it will be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.models.experts import SeparateExperts, find_separate_experts, is_fused
from compress.models.hooks import capture_inputs, removed_on_exit
from compress.models.structure import TransformerBlock
from compress.numerics.gptq import output_error
from compress.numerics.part_removal import remove_parts
from compress.numerics.pruning import most_important
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.calibration_activations import CalibrationActivations
from compress.stages.blockwise.layers import Layer
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.utils.errors import StageError
from compress.utils.torch_device import autocast

PLACES, NEURONS = "places", "neurons"


@dataclass(frozen=True)
class Part:
    """Parts of a block that are pruned together: the layer that reads its ``count`` parts, of which ``left`` remain."""

    layer: nn.Linear
    name: str
    count: int
    left: int


@dataclass
class Choice:
    """Selection of the parts that remain in one block after the other; without a ``stream`` the first ones."""

    decoder: BlockwiseModel
    sizes: Sizes
    stream: CalibrationActivations | None
    solves: bool
    damping: float
    solved: list[Layer] = field(default_factory=list)
    """Layers of the last block that were fitted, with the relative error of what they give."""

    def mixtures(self, index: int) -> dict[str, SeparateExperts]:
        """Return the mixtures of a block whose experts become fewer. Raises `StageError` if they are one tensor."""
        if not self.sizes.experts:
            return {}
        name = f"{self.decoder.prefix}.{index}"
        found = find_separate_experts(self.decoder.blocks[index], name)
        fused = [path for path, part in self.decoder.blocks[index].named_modules(prefix=name) if is_fused(part)]
        if fused:
            raise StageError(
                f"The experts of {fused[0]} cannot be told apart: the checkpoint keeps them in one tensor.",
                where="prune_decoder.experts",
                hint="leave experts out",
            )
        return found

    def of(self, index: int, block: TransformerBlock | None) -> dict[str, torch.Tensor]:
        """Return the remaining parts of a loaded block: of `PLACES`, `NEURONS`, and mixtures by name, ascending."""
        parts, mixtures = self._parts(block), self.mixtures(index)
        counts = {name: (part.count, part.left) for name, part in parts.items()}
        counts |= {name: (mixture.count, self.sizes.experts or 0) for name, mixture in mixtures.items()}
        self.solved = []
        if self.stream is None:
            return {name: torch.arange(left) for name, (_, left) in counts.items()}
        solves = self.solves and bool(parts)
        scores = _Scores()
        if mixtures or not solves:
            self._watch(self.stream, index, {} if solves else parts, mixtures, scores)
        found = {name: self._most(scores.of[name], counts[name][1]) for name in scores.of}
        if solves:
            found |= self._solved(self.stream, index, parts)
        return found

    def _parts(self, block: TransformerBlock | None) -> dict[str, Part]:
        read: dict[str, tuple[Any, int, int]] = {}
        if block is not None and self.sizes.places:
            read[PLACES] = block.require_attention().output, block.prunable_units, self.sizes.places
        if block is not None and self.sizes.neurons:
            read[NEURONS] = block.require_feed_forward().output, block.neurons, self.sizes.neurons
        named = self.decoder.name
        return {kind: Part(layer, named(layer), count, left) for kind, (layer, count, left) in read.items()}

    def _watch(
        self,
        stream: CalibrationActivations,
        index: int,
        parts: dict[str, Part],
        mixtures: dict[str, SeparateExperts],
        scores: _Scores,
    ) -> None:
        """Sum up ``scores`` while all windows pass the block as it is."""
        work = stream.pass_through(index, {})
        with ExitStack() as watched:
            layers = {kind: part.layer for kind, part in parts.items()}
            watched.enter_context(
                capture_inputs(layers, lambda kind, inputs: scores.add(kind, inputs, parts[kind].count))
            )
            watched.enter_context(
                removed_on_exit(
                    part.register_forward_pre_hook(_counting(scores, name, part), with_kwargs=True)
                    for name, part in mixtures.items()
                )
            )
            stream.leave(index, (work.run(batch()) for batch in work.batches))

    def _solved(self, stream: CalibrationActivations, index: int, parts: dict[str, Part]) -> dict[str, torch.Tensor]:
        """Return the remaining parts; update in place the layers that read them: zeros, and the rest compensates."""
        kinds, found = {part.name: kind for kind, part in parts.items()}, dict[str, torch.Tensor]()

        def solve(names: Sequence[str], hessian: torch.Tensor) -> None:
            for name in names:
                part = parts[kinds[name]]
                with autocast(False, self.decoder.device):  # the block's own pass may be in bf16
                    found[kinds[name]] = self._solve(part, hessian).cpu()

        modules = {part.name: part.layer for part in parts.values()}
        stream.leave(index, stream.pass_through(index, modules).solve(solve))
        return found

    def _solve(self, part: Part, hessian: torch.Tensor) -> torch.Tensor:
        whole = part.layer.weight
        size = whole.shape[1] // part.count
        try:
            stays, fitted = remove_parts(whole, hessian, size, part.left, self.damping)
        except ValueError as error:
            raise StageError(
                f"The layer {part.name} cannot be cut: {error}.",
                hint="give more calibration text (samples), or raise damp_percent",
            ) from error
        fitted = self.decoder.rounded(part.name, fitted)
        rows, columns = whole.shape
        self.solved.append(Layer(part.name, rows, columns, None, error=output_error(whole, fitted, hessian)))
        part.layer.weight = nn.Parameter(fitted, requires_grad=False)
        return stays

    @staticmethod
    def _most(scores: torch.Tensor, count: int) -> torch.Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise StageError(
                "What passes through a block on the calibration text is not finite.",
                expected="a model that computes finite numbers there",
                hint="set precision: fp32",
            )
        return most_important(scores.cpu(), count)


@dataclass
class _Scores:
    """Sums over calibration text of what each part of one block gave, or how often each expert was chosen."""

    of: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, count: int) -> None:
        """Add features [windows, length, width] in ``count`` parts (Muralidharan et al. 2024, section 2.2).

        The norm of a part at each token, its mean over a window's tokens, the sum of squares of that over windows.
        """
        windows = inputs.float().reshape(-1, inputs.shape[-2], count, inputs.shape[-1] // count)
        norms = torch.linalg.vector_norm(windows, dim=-1)
        self.of[name] = self.of.get(name, norms.new_zeros(count)) + norms.mean(dim=-2).square().sum(dim=0)


def _counting(scores: _Scores, name: str, part: SeparateExperts) -> Callable[..., None]:
    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen = named["top_k_index"] if "top_k_index" in named else arguments[1]
        scores.of[name] = scores.of.get(name, torch.zeros(part.count)) + part.routed(chosen).cpu()

    return before
