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

from compress.stages.training import processes
from compress.stages.training.augmentation import Augmentation
from compress.stages.training.checkpoint import (
    TrainingCheckpoint,
    TrainingState,
    moments,
    put_back,
    put_moments_back,
    trained_tensors,
)
from compress.stages.training.length import Length
from compress.stages.training.malloc import keep_freed_memory
from compress.stages.training.partial_forward import shortened
from compress.stages.training.settings import Augment, TrainingSettings
from compress.tasks.inference import tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.progress import Progress
from compress.utils.torch_device import CPU, autocast, device_memory_errors, device_uses_bf16


class NotFiniteError(StageError):
    """A loss or a gradient became infinite or NaN."""


BatchLoss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
_POOL = 50


@dataclass(frozen=True)
class Trainee:
    """Module to train, and how a batch is scored.

    ``loss`` gets the module (wrapped, for several processes) and a batch of model inputs with ``labels`` [B] and
    ``index`` [B] (positions in ``examples``).
    ``extra`` are parameters outside the module, such as projections. ``after_step`` may put weights back in shape.
    ``validate`` returns a metric, of which more is better, or with ``validates_loss`` a loss. ``first_token_only``: the
    last layer computes what a classifier reads, the first token.

    ``length`` is how long is trained, where the settings' epochs don't say it. ``pieces`` cuts a batch into several
    that go forwards and backwards one by one, whose losses add up to the batch's. ``together``: the batch size is that
    of all processes, and every batch has it. ``told`` hears of each step: how many are done, the share that these are
    of all, and the loss. With ``kept`` a killed training goes on where it was last kept, and one that comes to numbers
    that are not finite ends there, of which ``stopped`` hears. ``freeze_embeddings``: the embedding tables do not
    learn. ``augment`` varies the images of ``examples`` anew in every epoch. With ``keep_best`` the epoch with the
    best ``validate`` is kept.
    """

    module: nn.Module
    examples: Examples
    loss: BatchLoss
    extra: list[nn.Parameter] = field(default_factory=list)
    after_step: Callable[[int, int], None] | None = None
    validate: Callable[[], float] | None = None
    validates_loss: bool = False
    first_token_only: bool = False
    length: Length | None = None
    pieces: Callable[[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]] | None = None
    together: bool = False
    told: Callable[[int, float, float], None] | None = None
    kept: TrainingCheckpoint | None = None
    stopped: Callable[[str], None] | None = None
    freeze_embeddings: bool = False
    augment: Augment | None = None
    keep_best: bool = True


class LengthGroupedBatches(Sampler[list[int]]):
    """Shuffled batches of examples of similar length, so that little is spent on padding.

    Each epoch shuffles all examples, sorts pools of fifty batches by length, and shuffles the batches. With ``whole``
    those that would make a smaller batch are left out of it.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, whole: bool = False) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.whole = whole
        self.epoch = 0
        self.skipped = 0
        """Batches of the next epoch that are left out, since they have been learned from."""

    def __len__(self) -> int:
        full, remainder = divmod(len(self.lengths), self.batch_size * _POOL)
        last = remainder / self.batch_size
        return full * _POOL + (math.floor(last) if self.whole else math.ceil(last))

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        order = generator.permutation(len(self.lengths))
        batches = []
        pool = self.batch_size * _POOL
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            # Sorting within pools keeps batches random enough while their examples have similar lengths.
            members = members[np.argsort(self.lengths[members], kind="stable")]
            batches += [members[i : i + self.batch_size].tolist() for i in range(0, len(members), self.batch_size)]
        if self.whole:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        generator.shuffle(batches)
        # A resumed run skips the batches that it has already learned from.
        skipped, self.skipped = self.skipped, 0
        yield from batches[skipped:]


def train(trainee: Trainee, config: TrainingSettings, seed: int, progress: Progress, description: str) -> list[float]:
    """Train in place, and return the mean loss of each epoch.

    The same machine and thread count give the same bits. Started by `torchrun` or `accelerate launch`, every process
    trains on its share of the batches.

    Args:
        trainee: Module, loss and examples.
        config: Epochs, batch size, learning rate and their schedule.
        seed: Seed of all random states.
        progress: Receives steps and messages.
        description: Label of the progress bar.

    Raises:
        StageError: The loss or a gradient is not finite.
    """
    keep_freed_memory()
    # numpy's and Python's too: wav2vec2 draws with numpy what of a recording it masks.
    set_seed(seed)
    accelerator = processes.accelerator(split_batches=trainee.together)
    if trainee.freeze_embeddings:
        trainee.module.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    # With several processes the sampler yields whole batches, and accelerate splits them.
    sampler = LengthGroupedBatches(trainee.examples.lengths(), config.batch_size, seed, trainee.together)
    augmentation = Augmentation.of(trainee.augment, trainee.examples, seed) if trainee.augment else None

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        batch = tensors(trainee.examples, indices)
        return batch if augmentation is None else augmentation.vary(batch, indices, sampler.epoch)

    loader: DataLoader[int] = DataLoader(
        range(len(trainee.examples)),  # type: ignore[arg-type]  # batches are fetched whole, by their places
        batch_sampler=sampler,
        collate_fn=collate,
    )
    for parameter in trainee.extra:  # which accelerate isn't given
        parameter.data = parameter.data.to(accelerator.device)
    optimizer = _optimizer(trainee, config)
    module, optimizer, loader = accelerator.prepare(trainee.module, optimizer, loader)
    length = trainee.length or Length(max(1, round(config.epochs * len(loader))))
    session = _Session(trainee, config, accelerator, optimizer, length, sampler, progress, description)
    with (
        _dropout(trainee.module, config.dropout),
        device_memory_errors(description, "batch_size or the length of examples"),
    ):
        losses = session.run(module, loader)
    if trainee.freeze_embeddings:
        trainee.module.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    # The trained weights are moved to the CPU, where they are saved and later stages start.
    trainee.module.eval().to(CPU)
    return losses


@contextlib.contextmanager
def _dropout(module: nn.Module, probability: float | None) -> Iterator[None]:
    """Train with another dropout probability than the model's own, and put that back."""
    probabilities = {layer: layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)}
    for layer in probabilities:
        layer.p = layer.p if probability is None else probability
    try:
        yield
    finally:
        for layer, original in probabilities.items():
            layer.p = original


def _optimizer(trainee: Trainee, config: TrainingSettings) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain = list(trainee.extra)
    for parameter in trainee.module.parameters():
        if parameter.requires_grad:
            # Biases and norms have one dimension, and weight decay does not help them.
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    decays = ((decayed, config.optimizer.weight_decay), (plain, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


@dataclass
class _Session:
    trainee: Trainee
    config: TrainingSettings
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    length: Length
    sampler: LengthGroupedBatches
    progress: Progress
    description: str
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    done: int = 0
    losses: list[float] = field(default_factory=list)
    total: float = 0.0
    """Of the losses in this epoch."""
    over: bool = False

    def run(self, module: nn.Module, loader: DataLoader[int]) -> list[float]:
        """Train the module on the batches of ``loader``, and return the mean loss of each epoch."""
        module.train()
        checkpoint, stopped = self.trainee.kept, self.trainee.stopped
        # Restore the state of a killed run, if there is one.
        if checkpoint is not None and (state := checkpoint.read()) is not None:
            self._restore(state)
            self.sampler.epoch, self.sampler.skipped = divmod(self.done, len(loader))
            self.progress.note(f"{self.description}: resuming after step {self.done}")
        self.length.begin()
        try:
            batches, steps_before = self._batches(loader), self.done
            # With a time budget the number of steps is an estimate that changes.
            left = self.length.steps_in_all(steps_before) - steps_before
            total = left if self.length.seconds is None else lambda: self.length.steps_in_all(self.done) - steps_before
            for batch in self.progress.track(batches, self.description, total):
                self._step(module, batch)
                self.over = self._is_over()
                if self.done % len(loader) == 0 or self.over:
                    self._end_epoch(len(loader))
                    module.train()
                if checkpoint is not None and checkpoint.is_due():
                    tensors = trained_tensors(self.trainee.module, self.trainee.extra)
                    merit, best = self.best or (None, None)
                    figures = {"done": self.done, "losses": self.losses, "total": self.total, "best": merit}
                    figures["seconds"] = self.length.seconds_spent()
                    checkpoint.write(TrainingState(figures, tensors, moments(self.optimizer), best))
        except NotFiniteError as error:
            # End with the state that was last stored.
            state = None if checkpoint is None or stopped is None else checkpoint.read()
            if state is None or stopped is None:
                raise
            self.optimizer.zero_grad()
            self._restore(state)
            after = f"The model is as it was after step {self.done}"
            stopped(f"{self.description}: {error.what} {after}; {error.hint}.")
            if self.done % len(loader):
                self._end_epoch(len(loader))
        # Return to the weights of the best epoch.
        if self.best is not None:
            self.trainee.module.load_state_dict(self.best[1])
        return self.losses

    def _is_over(self) -> bool:
        over = self.length.is_over(self.done)
        return over if self.length.seconds is None else processes.first_says(over)

    def _batches(self, loader: DataLoader[int]) -> Iterator[dict[str, torch.Tensor]]:
        checkpoint = self.trainee.kept
        self.over = self.done > 0 and self._is_over()
        while not self.over:
            # The loader draws a number as an epoch begins; what was kept within one was kept after that.
            within = self.sampler.skipped > 0
            if checkpoint is not None and not within:
                checkpoint.restore_random_state()
            for batch in loader:
                if checkpoint is not None and within:
                    checkpoint.restore_random_state()
                within = False
                yield batch
                if self.over:
                    return

    def _step(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        trainee = self.trainee
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.length.rate(
                self.done, self.config.optimizer.warmup_ratio, self.config.optimizer.decay
            )
        # Gradient accumulation: the pieces' gradients add up to that of the batch.
        pieces = [batch] if trainee.pieces is None else trainee.pieces(batch)
        value = 0.0
        for piece_number, piece in enumerate(pieces, 1):
            with contextlib.nullcontext() if piece_number == len(pieces) else self.accelerator.no_sync(module):
                loss = self._loss(module, piece)
                piece_value = float(processes.mean(loss.detach()))
                self._require_finite("The training loss", piece_value)
                self.accelerator.backward(loss)
                value += piece_value
        parameters = [*trainee.module.parameters(), *trainee.extra]
        # All processes see the same norm, so all of them stop if it is not finite.
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.optimizer.max_gradient_norm)
        if norm is not None:
            self._require_finite("The gradient's length", float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        if trainee.after_step is not None:
            trainee.after_step(self.done, self.length.steps)
        self.total += value
        if trainee.told is not None:
            trainee.told(self.done, self.length.share(self.done), value)

    def _loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        trainee, device = self.trainee, self.accelerator.device.type
        with (
            autocast(device_uses_bf16(self.config.precision, device), device),
            shortened(trainee.module, trainee.first_token_only),
        ):
            return trainee.loss(module, batch)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{what} became {value} at step {self.done + 1}{self.length.of()}.",
                hint="lower learning_rate, or set precision: fp32",
            )

    def _restore(self, state: TrainingState) -> None:
        put_back(trained_tensors(self.trainee.module, self.trainee.extra), state.tensors)
        put_moments_back(self.optimizer, state.moments)
        figures = state.figures
        self.done, self.losses, self.total = figures["done"], list(figures["losses"]), figures["total"]
        self.best = None if state.best is None else (figures["best"], state.best)
        self.length.go_on(figures["seconds"])

    def _end_epoch(self, batches: int) -> None:
        """Report the loss of an epoch of ``batches``, and keep its weights if it is the best one."""
        self.losses.append(self.total / ((self.done - 1) % batches + 1))
        self.total = 0.0
        summary = f"{self.description}: epoch {len(self.losses)}, loss {self.losses[-1]:.4f}"
        if self.trainee.validate is None:
            self.progress.note(summary)
            return
        self.trainee.module.eval()
        value = self.trainee.validate()
        merit = -value if self.trainee.validates_loss else value
        self.progress.note(f"{summary}, validation {'loss ' if self.trainee.validates_loss else ''}{value:.4f}")
        if self.trainee.keep_best and (self.best is None or merit > self.best[0]):
            state = {name: tensor.detach().clone() for name, tensor in self.trainee.module.state_dict().items()}
            self.best = merit, state
