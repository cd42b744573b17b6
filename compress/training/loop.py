"""The training loop: AdamW, linear warm-up and decay, batches of similar length, the best epoch kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import set_seed

from compress.environment import uses_bf16
from compress.errors import StageError
from compress.progress import Progress
from compress.tasks.forward import tensors
from compress.tasks.task import Examples
from compress.training import processes
from compress.training.augmentation import Augmentation
from compress.training.config import Training
from compress.training.freed_memory import keep_freed_memory
from compress.training.short_forward import FrozenLayers, shortened

BatchLoss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
_POOL = 50


@dataclass(frozen=True)
class Trainee:
    """What is trained and how a batch is scored.

    ``loss`` gets the module (wrapped, for several processes) and a batch of model inputs with ``labels`` [B] and
    ``index`` [B] (positions in ``examples``).
    ``extra`` are parameters outside the module, such as projections. ``after_step`` may put weights back in shape.
    ``validate`` returns a figure of merit; larger is better. The ``frozen_layers`` lowest layers do not learn, nor do
    the embeddings below them. ``first_token_only``: the last layer computes what a classifier reads, the first token.
    """

    module: nn.Module
    examples: Examples
    loss: BatchLoss
    extra: list[nn.Parameter] = field(default_factory=list)
    after_step: Callable[[int, int], None] | None = None
    validate: Callable[[], float] | None = None
    frozen_layers: int = 0
    first_token_only: bool = False


class LengthGroupedBatches(Sampler[list[int]]):
    """Shuffled batches of examples of similar length, so that little is spent on padding.

    Each epoch shuffles all examples, sorts pools of fifty batches by length, and shuffles the batches.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        pool = self.batch_size * _POOL
        full, rest = divmod(len(self.lengths), pool)
        return full * _POOL + math.ceil(rest / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        order = generator.permutation(len(self.lengths))
        batches = []
        pool = self.batch_size * _POOL
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            members = members[np.argsort(self.lengths[members], kind="stable")]
            batches += [members[i : i + self.batch_size].tolist() for i in range(0, len(members), self.batch_size)]
        generator.shuffle(batches)
        yield from batches


def train(trainee: Trainee, config: Training, seed: int, progress: Progress, description: str) -> list[float]:
    """Train in place; returns the mean loss of each epoch. Raises `StageError` when the loss is not finite.

    The random state is set from ``seed``, so that the same machine and thread count give the same bits. Started by
    `torchrun` or `accelerate launch`, every process trains on its share of the batches.
    """
    keep_freed_memory()
    # numpy's and Python's too: wav2vec2 draws with numpy what of a recording it masks.
    set_seed(seed)
    accelerator = processes.accelerator()
    if config.freeze_embeddings:
        trainee.module.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    frozen = FrozenLayers(trainee.module, trainee.frozen_layers) if trainee.frozen_layers else None
    if frozen is not None:
        frozen.requires_grad_(False)
    sampler = LengthGroupedBatches(trainee.examples.lengths(), config.batch_size, seed)
    augmentation = Augmentation.of(config.augment, trainee.examples, seed) if config.augment else None

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        batch = tensors(trainee.examples, indices)
        return batch if augmentation is None else augmentation.vary(batch, indices, sampler.epoch)

    loader: DataLoader[int] = DataLoader(
        range(len(trainee.examples)),  # type: ignore[arg-type]  # batches are fetched whole, by their places
        batch_sampler=sampler,
        collate_fn=collate,
    )
    optimizer = _optimizer(trainee, config)
    module, optimizer, loader = accelerator.prepare(trainee.module, optimizer, loader)
    if frozen is not None and augmentation is None:
        frozen.keep_states(trainee.examples, uses_bf16(config.precision), progress, description)
    steps = max(1, round(config.epochs * len(loader)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay(steps, config.warmup_ratio))
    session = _Session(trainee, config, accelerator, optimizer, schedule, steps, frozen)
    with _dropout(trainee.module, config.dropout):
        losses = session.run(module, loader, progress, description)
    if frozen is not None:
        frozen.requires_grad_(True)
    if config.freeze_embeddings:
        trainee.module.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    trainee.module.eval()
    return losses


@contextlib.contextmanager
def _dropout(module: nn.Module, probability: float | None) -> Iterator[None]:
    """Train with another dropout probability than the model's own, and put that back."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = layer.p if probability is None else probability
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.p = own


def _optimizer(trainee: Trainee, config: Training) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain = list(trainee.extra)
    for parameter in trainee.module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def warm_up_then_decay(steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The share of the peak learning rate at each of so many steps."""
    warmup = max(1, round(warmup_ratio * steps))

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)

    return factor


@dataclass
class _Session:
    trainee: Trainee
    config: Training
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps: int
    frozen: FrozenLayers | None
    best: tuple[float, dict[str, torch.Tensor]] | None = None

    def run(self, module: nn.Module, loader: DataLoader[int], progress: Progress, description: str) -> list[float]:
        losses, total = [], 0.0
        module.train()
        for done, batch in enumerate(progress.track(self._batches(loader), description, self.steps), 1):
            total += self._step(module, batch, done)
            if done % len(loader) == 0 or done == self.steps:
                losses.append(total / ((done - 1) % len(loader) + 1))
                total = 0.0
                self._judge(progress, description, losses)
                module.train()
        if self.best is not None:
            self.trainee.module.load_state_dict(self.best[1])
        return losses

    def _batches(self, loader: DataLoader[int]) -> Iterator[dict[str, torch.Tensor]]:
        left = self.steps
        while left > 0:
            for batch in loader:
                if left == 0:
                    return
                left -= 1
                yield batch

    def _step(self, module: nn.Module, batch: dict[str, torch.Tensor], done: int) -> float:
        device = self.accelerator.device.type
        trainee = self.trainee
        if self.frozen is not None:
            self.frozen.choose(batch["index"].tolist())
        with (
            torch.autocast(device, torch.bfloat16, enabled=uses_bf16(self.config.precision)),
            shortened(trainee.module, self.frozen, trainee.first_token_only),
        ):
            loss = trainee.loss(module, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise StageError(
                f"The training loss became {value} at step {done} of {self.steps}.",
                mend="lower learning_rate, or set precision: fp32",
            )
        self.accelerator.backward(loss)
        parameters = [*self.trainee.module.parameters(), *self.trainee.extra]
        self.accelerator.clip_grad_norm_(parameters, self.config.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.trainee.after_step is not None:
            self.trainee.after_step(done, self.steps)
        return value

    def _judge(self, progress: Progress, description: str, losses: list[float]) -> None:
        """Say how the epoch went, and keep it if it is the best one."""
        said = f"{description}: epoch {len(losses)}, loss {losses[-1]:.4f}"
        if self.trainee.validate is None:
            progress.note(said)
            return
        self.trainee.module.eval()
        merit = self.trainee.validate()
        progress.note(f"{said}, validation {merit:.4f}")
        if self.config.keep_best and (self.best is None or merit > self.best[0]):
            state = {name: tensor.detach().clone() for name, tensor in self.trainee.module.state_dict().items()}
            self.best = merit, state
