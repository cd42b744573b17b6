"""Teaching a quantized model to predict as the model before quantization does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.models.processor import load_tokenizer
from compress.models.quantized_module import QuantizedEmbedding, QuantizedLinear
from compress.numerics.language_head import Divergence, HeadLoss, LanguageHead, head_divergence, head_loss, token_scores
from compress.stages.base import Context
from compress.stages.recovery.settings import AdapterTraining, Recovery, ScaleTuning
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.loop import Trainee, train
from compress.stages.training.sequences import TokenSequences, check_enough
from compress.stages.training.settings import Optimizer, TrainingSettings
from compress.tasks.task import Examples
from compress.utils.errors import DataError, StageError
from compress.utils.torch_device import uses_bf16

MOST_PASSES = 1000
_PROBE_TOKENS = 16
_SAME_LOGITS = 1e-3


class Quality(NamedTuple):
    """On held-out windows: mean KL to the teacher in nats a token, and both models' perplexity."""

    divergence: float
    perplexity: float
    teacher_perplexity: float

    def error(self, logits_weight: float, labels_weight: float) -> float:
        """Return the loss to reduce, in nats a token; for text alone its loss, whatever its weight."""
        loss = math.log(self.perplexity)
        return logits_weight * self.divergence + labels_weight * loss if logits_weight else loss


class Recovered(NamedTuple):
    """Quality before and after a recovery."""

    before: Quality
    after: Quality

    def __str__(self) -> str:
        first, after = self.before, self.after
        return (
            f"KL {first.divergence:.4f} -> {after.divergence:.4f} nats a token, perplexity {first.perplexity:.2f} -> "
            f"{after.perplexity:.2f} (teacher {after.teacher_perplexity:.2f}) on held-out windows"
        )


def recovery_sequences(checkpoint: Checkpoint, settings: Recovery, context: Context) -> TokenSequences:
    """Tokenize the recipe's text into sequences. Raises `DataError` and `ModelError`."""
    tokenizer = load_tokenizer(checkpoint.folder)

    def cut(split: str) -> list[dict[str, np.ndarray]]:
        rows = context.data.split(split)
        encoded = context.task.encode(rows, tokenizer, None, settings.sequence_length)
        return [{"input_ids": window["input_ids"]} for window in encoded.inputs]

    learned = cut("train")
    if "validation" in context.data.splits:
        judged = cut("validation")
    else:
        judged, learned = learned[-settings.validation_windows :], learned[: -settings.validation_windows]
    check_enough(learned, judged, settings.batch_size, settings.sequence_length)
    if settings.steps * settings.batch_size > MOST_PASSES * len(learned):
        raise DataError(
            f"{settings.steps} steps would repeat each of the {len(learned)} windows more than {MOST_PASSES} times.",
            where="data.splits.train",
            hint="name more text, or lower steps",
        )
    chosen = np.unique(np.linspace(0, len(judged) - 1, settings.validation_windows).round().astype(int))
    return TokenSequences(Examples(learned, {"input_ids": 0}), Examples([judged[i] for i in chosen], {"input_ids": 0}))


def token_shares(ids: torch.Tensor, counted: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's share of the loss on predictions and of that on the following tokens, both [B, L].

    Either sums to 1 over the batch, of all processes' on average. ``counted`` is 1 where a token is to be learned: what
    counts then is the prediction of it, one place before. The last token of a window is followed by none.
    """
    token_weights = torch.ones(ids.shape, device=ids.device)
    labels_each = token_weights.clone()
    labels_each[:, -1] = 0
    if counted is not None:
        labels_each *= counted.roll(-1, 1)
        token_weights = labels_each.clone()
    first, second = (share / processes.mean(share.sum()).clamp(min=1) for share in (token_weights, labels_each))
    return first, second


class Body(nn.Module):
    """A causal model without its head: token ids [B, L] -> hidden states [B, L, W].

    Where its vocabulary is not the one that texts are given in, ``tokens`` [v] are its own ids of those.
    """

    def __init__(self, causal: PreTrainedModel, tokens: torch.Tensor | None = None) -> None:
        super().__init__()
        self.causal = causal
        self.tokens = tokens

    def outputs(self, input_ids: torch.Tensor, **options: object) -> ModelOutput:
        """Return the base model's output for token ids."""
        ids = input_ids if self.tokens is None else self.tokens.to(input_ids.device)[input_ids]
        return self.causal.base_model(input_ids=ids, use_cache=False, **options)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the states that the head turns into logits."""
        return self.outputs(input_ids).last_hidden_state  # type: ignore[no-any-return]

    def head(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the head's weight [V, W]."""
        layer = self.causal.get_output_embeddings()
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            return layer.grid.weight(dtype)
        weight: torch.Tensor = layer.weight
        return (weight if self.tokens is None else weight[self.tokens.to(weight.device)]).to(dtype)

    def move(self, device: torch.device) -> None:
        """Move the weights to ``device``."""
        if next(self.parameters()).device != device:
            self.to(device)

    def require_plain_head(self, windows: Examples) -> None:
        """Prove that logits are the head's product with the last states, and nothing more (no cap, no factor)."""
        ids = torch.from_numpy(windows.inputs[0]["input_ids"][None, :_PROBE_TOKENS])
        with torch.inference_mode():
            student_ids = ids if self.tokens is None else self.tokens[ids]
            logits = self.causal(input_ids=student_ids, use_cache=False).logits
            logits = logits if self.tokens is None else logits[..., self.tokens]
            difference = float((self(ids) @ self.head(torch.float32).T - logits).abs().max())
        if not math.isfinite(difference):
            raise StageError(
                f"The logits of {type(self.causal).__name__} are not finite.",
                expected="a model whose predictions are finite before any training",
            )
        if not difference <= _SAME_LOGITS * float(logits.abs().max()):
            raise StageError(
                f"{type(self.causal).__name__} applies more than its head to its last hidden states.",
                expected="logits that are a plain product, without bias, factor or cap",
                hint="leave this stage out for such a model",
            )

    def lower(self) -> None:
        """Turn linear layers to bfloat16, in place: autocast would turn the same weights at every step."""
        for layer in self.causal.base_model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.to(torch.bfloat16)


def head_of(body: Body, states: torch.Tensor, dtype: torch.dtype) -> LanguageHead:
    """Return states [B, L, W] with the head of ``body``, as tokens in a row."""
    return LanguageHead(states.flatten(0, 1).to(dtype), body.head(dtype))


def states_of(body: Body, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the last states for ids [B, L], with products in ``dtype``."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        states: torch.Tensor = body(ids)
    return states


@dataclass
class Judge:
    """Evaluation of a student on held-out sequences, ``size`` at a time; the teacher's states are cached."""

    student: Body
    teacher: Body
    held_out: Examples
    size: int
    dtype: torch.dtype
    known: dict[int, torch.Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def quality(self) -> Quality:
        """Return the student's current quality."""
        columns: list[Any] = []
        device = next(self.student.parameters()).device
        self.teacher.move(device)
        for start in range(0, len(self.held_out), self.size):
            indices = range(start, min(start + self.size, len(self.held_out)))
            ids = torch.from_numpy(self.held_out.batch(indices)["input_ids"]).to(device)
            if start not in self.known:
                self.known[start] = states_of(self.teacher, ids, self.dtype)[:, :-1].to(self.dtype)
            student_head = head_of(self.student, states_of(self.student, ids, self.dtype)[:, :-1], self.dtype)
            teacher_head = head_of(self.teacher, self.known[start].to(device), self.dtype)
            columns.append(token_scores(student_head, teacher_head, ids[:, 1:].flatten()))
        means = [float(torch.cat(parts).double().mean()) for parts in zip(*columns, strict=True)]
        return Quality(means[0], float(np.exp(means[1])), float(np.exp(means[2])))


@dataclass
class RecoveryTrainer:
    """Trainer of one recovery: the student with its trainable parameters set, its teacher and the sequences.

    ``known`` keeps the teacher's states for training windows that come again.
    """

    student: Body
    teacher: Body
    windows: TokenSequences
    settings: ScaleTuning | AdapterTraining
    dtype: torch.dtype = torch.float32
    known: dict[int, torch.Tensor] = field(default_factory=dict)
    judge: Judge = field(init=False)

    def __post_init__(self) -> None:
        self.judge = Judge(self.student, self.teacher, self.windows.held_out, self.settings.batch_size, self.dtype)

    @classmethod
    def between(
        cls,
        student: PreTrainedModel,
        teacher: TorchModel,
        windows: TokenSequences,
        settings: ScaleTuning | AdapterTraining,
    ) -> RecoveryTrainer:
        """Prepare the training of a quantized student towards its float teacher.

        Args:
            student: Quantized model.
            teacher: Float model.
            windows: Token sequences of the training.
            settings: Settings of the training.
        """
        bodies = Body(student), Body(teacher.module.eval().requires_grad_(False))
        vocabularies = [len(body.head(torch.float32)) for body in bodies]
        if vocabularies[0] != vocabularies[1]:
            raise StageError(
                f"The quantized model has {vocabularies[0]} tokens, its teacher {vocabularies[1]}.",
                hint="name a teacher with the same vocabulary, such as the output of the stage before quantization",
            )
        largest = max(int(window["input_ids"].max()) for window in (*windows.train.inputs, *windows.held_out.inputs))
        if largest >= vocabularies[0]:
            raise StageError(
                f"The text has the token {largest}; the model has {vocabularies[0]}.",
                expected="the tokenizer that the model was trained with",
            )
        for body in bodies:
            body.require_plain_head(windows.held_out)
        dtype = torch.bfloat16 if uses_bf16(settings.precision) else torch.float32
        if dtype == torch.bfloat16:
            bodies[1].lower()
        return cls(*bodies, windows, settings, dtype)

    def train(self, context: Context, description: str) -> Recovered:
        """Train the student in place, and report the change."""
        quality_before = self.quality()
        context.progress.detail(
            f"{description}: KL to the teacher {quality_before.divergence:.4f} nats a token, perplexity "
            f"{quality_before.perplexity:.2f} (teacher {quality_before.teacher_perplexity:.2f}) before"
        )
        trainee = Trainee(
            self.student,
            self.windows.train,
            self.loss,
            validate=lambda: self._error(self.quality()),
            validates_loss=True,
            kept=None if processes.num_processes() > 1 else TrainingCheckpoint(context.scratch),
        )
        settings = self.settings
        config = TrainingSettings(
            epochs=settings.steps / -(-len(self.windows.train) // settings.batch_size),
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            optimizer=Optimizer(warmup_ratio=settings.warmup_ratio, weight_decay=0.0),
            dropout=0.0,
            precision="bf16" if self.dtype == torch.bfloat16 else "fp32",
        )
        train(trainee, config, context.seed, context.progress, description)
        # The loop has put back the state that was judged best, by this run or by one that was killed.
        recovered = Recovered(quality_before, self.quality())
        context.note(f"{description}: {recovered}")
        return recovered

    def helped(self, recovered: Recovered) -> bool:
        """Return whether the student predicts better by the losses it was trained on."""
        return self._error(recovered.after) < self._error(recovered.before)

    def _error(self, quality: Quality) -> float:
        return quality.error(1.0, self.settings.labels_weight)

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean KL to the teacher, plus the weighted cross-entropy of the following tokens."""
        labels_weight, ids = self.settings.labels_weight, batch["input_ids"]
        states = head_of(self.student, module(ids), self.dtype)
        taught = head_of(self.teacher, self._taught(batch), self.dtype)
        if not labels_weight:
            return head_divergence(states, taught)
        token_weights, labels_each = (share.flatten() for share in token_shares(ids, None))
        following = ids.roll(-1, 1).flatten()
        return head_loss(states, taught, HeadLoss(Divergence(), token_weights, following, labels_weight * labels_each))

    @torch.no_grad()
    def _taught(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the teacher's states for a batch, cached if the batch comes again."""
        indices = batch["index"].tolist()
        if len(self.windows.train) // self.settings.batch_size >= self.settings.steps:
            return states_of(self.teacher, batch["input_ids"], self.dtype)
        missing = [position for position, index in enumerate(indices) if index not in self.known]
        if missing:
            states = states_of(self.teacher, batch["input_ids"][missing], self.dtype).to(self.dtype)
            self.known |= {indices[position]: state for position, state in zip(missing, states, strict=True)}
        return torch.stack([self.known[index] for index in indices])

    def quality(self) -> Quality:
        """Return the student's current quality."""
        return self.judge.quality()
