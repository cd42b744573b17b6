"""How much each token of the calibration text counts for a layer: by how much the answers depend on its outputs there.

The error of a layer's outputs hurts where the loss is steep in them. To second order the divergence of the answers is
half the sum, over tokens t and outputs k, of (dL/dz_tk)^2 (E x_t)_k^2, L being the loss on answers drawn from the model
itself (the Fisher information; Kunstner et al. 2019, section 2). Averaged over the outputs of a layer, that weights the
tokens of its Hessian (GuidedQuant, Kim et al. 2025, section 3.2, with one group). Found on the float model before any
layer is rounded: forwards once, then backwards block by block, with one block in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.models.experts import find_separate_experts, owning_experts
from compress.models.hooks import capture_outputs
from compress.stages.blockwise.block_pass import gram
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.calibration import BlockRun, Importance, States
from compress.stages.blockwise.layers import linears
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError
from compress.utils.progress import Progress
from compress.utils.torch_device import autocast, device_uses_bf16


@dataclass
class Gradients:
    """A pass of token ``ids`` [windows, length] forwards and backwards through the blocks of ``decoder``.

    ``folder`` takes the hidden states of every block: 4 bytes * tokens * hidden size for each. In memory are one block
    at a time, and on the way back one window.
    """

    decoder: BlockwiseModel
    config: Quantization
    ids: torch.Tensor
    folder: Path
    progress: Progress
    seed: int = 0

    def importance(self) -> Importance:
        """Measured now. Raises `StageError` for gradients that are not finite."""
        self.folder.mkdir(parents=True, exist_ok=True)
        count = len(self.decoder.blocks)
        steps = iter(self.progress.track(range(2 * count), "measuring token importance", 2 * count))
        with torch.no_grad():
            batches = (self.decoder.embedded(rows) for rows in torch.split(self.ids, 1))
            states = [self._kept("enter-00000.bin", "what enters the first block", batches)]
            for index in range(count):
                next(steps)
                self.decoder.load(index)
                run = BlockRun.of(self.decoder, self.config, index, self.ids)
                outputs = (run(states[-1][some]) for some in run.slices())
                what = f"what comes after {self.decoder.prefix}.{index}"
                states.append(self._kept(f"enter-{index + 1:05}.bin", what, outputs))
                self.decoder.unload(index)
        gradient, head = self._answers(states.pop())
        layers: dict[str, torch.Tensor] = {}
        for index in reversed(range(count)):
            next(steps)
            gradient = self._backwards(index, states.pop(), gradient, layers)
        next(steps, None)
        # The factor that a model applies to the rows of its table, judged by their size.
        with torch.no_grad():
            rows = self.decoder.checkpoint.stored(f"{self.decoder.name(self.decoder.embedding)}.weight")[self.ids[0]]
            factor = float(self.decoder.embedded(self.ids[:1]).norm() / rows.float().norm().clamp(min=1e-30))
        # The mean outer product of the gradient by the table's rows, from that by the first block's input.
        embedding = torch.zeros(self.decoder.hidden_size, self.decoder.hidden_size, device=self.decoder.device)
        for window in range(len(self.ids)):
            embedding.add_(gram(gradient[window : window + 1]), alpha=factor**2 / len(self.ids))
        shutil.rmtree(self.folder)
        return Importance({name: weights.cpu() for name, weights in layers.items()}, head.cpu(), embedding.cpu())

    def _kept(self, name: str, what: str, batches: Iterable[torch.Tensor]) -> States:
        """Write batches into a file. Raises `StageError` if one is not finite."""
        states = States(self.folder / name, (*self.ids.shape, self.decoder.hidden_size), self.decoder.device)
        return states.write(_finite(batch, what) for batch in batches)

    def _answers(self, states: States) -> tuple[States, torch.Tensor]:
        """Return the loss's gradient by the last block's outputs, and the importance of each token to the head."""
        generator = torch.Generator(self.decoder.device).manual_seed(self.seed)
        head: list[torch.Tensor] = []

        def gradient(window: int) -> torch.Tensor:
            # A function of its own, so that one window's logits are gone before the next one's are there.
            hidden = states[window : window + 1].clone().requires_grad_()
            with autocast(device_uses_bf16(self.config.precision, self.decoder.device), self.decoder.device):
                logits = self.decoder.logits(hidden)[0]
            slope = _finite(torch.softmax(logits.detach(), dim=-1, dtype=torch.float32), "the answer")
            head.append(1 - torch.linalg.vector_norm(slope, dim=-1).square())
            answers = torch.multinomial(slope, 1, generator=generator)
            slope.scatter_add_(1, answers, slope.new_full(answers.shape, -1.0))
            torch.autograd.backward(logits, slope.to(logits.dtype))
            return _of(hidden)

        gradients = (gradient(window) for window in range(len(self.ids)))
        return self._kept("leave.bin", "the gradient before the head", gradients), torch.cat(head)

    def _backwards(self, index: int, states: States, gradient: States, layers: dict[str, torch.Tensor]) -> States:
        """Return the gradient by a block's input, from that by its output; add its layers' weights to ``layers``."""
        block, prefix = self.decoder.load(index), f"{self.decoder.prefix}.{index}"
        experts = find_separate_experts(block, prefix)
        plain = {name: part for name, part in linears(block, prefix).items() if not owning_experts(name, experts)}
        run = BlockRun.of(self.decoder, self.config, index, self.ids)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in plain}

        def look(name: str, output: torch.Tensor) -> None:
            """Keep the mean square of the gradient by a layer's outputs at each token, on the way back."""
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda slope: seen[name].append(slope.float().square().mean(-1).flatten())
            )

        def gradients() -> Iterator[torch.Tensor]:
            # One window at a time: much more is kept for the way back than forwards.
            for window in range(len(self.ids)):
                some = slice(window, window + 1)
                hidden = states[some].clone().requires_grad_()
                with capture_outputs(plain, look):
                    torch.autograd.backward(run(hidden), gradient[some])
                yield _of(hidden)

        gradient_states = self._kept(f"gradient-{index:05}.bin", f"the gradient before {prefix}", gradients())
        for used in (states, gradient):
            used.path.unlink()
        self.decoder.unload(index)
        # Weights have the mean 1; all are alike if no prediction depends on any of them.
        for name, parts in seen.items():
            if parts:
                weights = torch.cat(parts)
                mean = weights.mean()
                layers[name] = weights / mean if float(mean) > 0 else torch.ones_like(weights)
        return gradient_states


def _of(hidden: torch.Tensor) -> torch.Tensor:
    assert hidden.grad is not None
    return hidden.grad


def _finite(values: torch.Tensor, what: str) -> torch.Tensor:
    # A sum of finite numbers may overflow, but one that is finite has only finite parts; it needs no mask.
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise StageError(
            f"On the calibration text {what} is not finite.",
            expected="a model that computes finite numbers there, forwards and backwards",
            hint="set precision: fp32, or guided: false",
        )
    return values
