"""A draft head learns to foretell the tokens of its model, from the model's own states (EAGLE-3, Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.eagle3 import DraftHead, new_head, write_head
from compress.checkpoints.head_checkpoint import HeadCheckpoint, heard_blocks
from compress.checkpoints.processor import load_tokenizer
from compress.checkpoints.quantized_module import QuantizedEmbedding, load_module, with_float_weights
from compress.checkpoints.torch_model import TorchModel
from compress.compute_device import uses_bf16
from compress.errors import StageError
from compress.training import processes
from compress.training.eagle3_config import HeadTraining
from compress.training.kept_training import KeptTraining
from compress.training.lesson_windows import Windows, check_enough
from compress.training.loop import Trainee, train
from compress.training.recovery import Body, make_windows
from compress.training.teacher_states import TeacherStates, with_room
from compress.training.teacher_text import with_written

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from compress.stage.stage import Context

_HEARD, _LAST, _LIKELIEST = "heard", "last", "likeliest"
_FADES = 0.8
"""What the loss of each further token counts, of that before it (section 3.2)."""


def train_head(checkpoint: Checkpoint, settings: HeadTraining, context: Context) -> HeadCheckpoint:
    """A folder with a trained draft head of ``checkpoint``, in the scratch folder; the first process has it.

    Raises `StageError` for a model that a head cannot be made for, and `DataError` for text that is too short.
    """
    module, tokenizer = with_float_weights(load_module(checkpoint)), load_tokenizer(checkpoint.folder)
    _read_generation_config(module, checkpoint)
    windows, low = make_windows(checkpoint, settings, context), uses_bf16(settings.precision)
    Body(module).require_plain_head(windows.held_out)
    module = module.to(torch.bfloat16) if low else module
    if settings.teacher_writes is not None:
        writer = TorchModel(module, tokenizer)
        own, judges = settings.teacher_writes, settings.validation_windows
        windows, _ = with_written(windows, own, writer, tokenizer, context, low, ends=False, held_out=judges)
        check_enough(windows.train.inputs, windows.held_out.inputs, settings.batch_size, settings.sequence_length)
    torch.manual_seed(context.seed)
    known = frequent_tokens(windows, settings.draft_vocab_size, module.config.get_text_config().vocab_size)
    # States at four depths, the last of them behind the norm.
    told = 4 * module.config.get_text_config().hidden_size * module.dtype.itemsize
    kept = with_room(context.scratch / "said", windows, told, "eagle3", context)
    lesson = HeadLesson(new_head(module, known), Body(module), windows, settings, kept)
    lesson.teach(context, low)
    folder = context.scratch / "head"
    return write_head(lesson.head, checkpoint, folder) if processes.is_first() else HeadCheckpoint(folder)


def _read_generation_config(module: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """What ends the model's answers may stand beside its config."""
    if (checkpoint.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        module.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)


def frequent_tokens(windows: Windows, count: int, vocabulary: int) -> torch.Tensor:
    """The ids of so many tokens, those that are most frequent in what is learned from, in their own order."""
    seen = np.concatenate([window["input_ids"] for window in windows.train.inputs])
    often = np.bincount(seen, minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-often, kind="stable")[:count]))


class Said(NamedTuple):
    """What the model has and says at each place of some windows.

    ``heard`` [B, L, 3 W] are its states at three depths, ``likeliest`` [B, L] the token that it would write behind, and
    ``shares`` [B, L, v] the probabilities of those that the head knows, among them.
    """

    heard: torch.Tensor
    likeliest: torch.Tensor
    shares: torch.Tensor


@dataclass
class HeadLesson:
    """A head, the model that it drafts for, and what it learns from; ``folder`` keeps what the model says."""

    head: DraftHead
    model: Body
    windows: Windows
    settings: HeadTraining
    folder: Path | None = None

    def __post_init__(self) -> None:
        heard = heard_blocks(self.model.causal.config.get_text_config().num_hidden_layers)

        def said(model: Body, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            model.move(ids.device)
            outputs = model.outputs(ids, output_hidden_states=True)
            states = outputs.last_hidden_state
            logits = states @ model.head(states.dtype).T
            three = torch.cat([outputs.hidden_states[place + 1] for place in heard], -1)
            return {_HEARD: three[0], _LAST: states[0], _LIKELIEST: logits.argmax(-1)[0]}

        self.states = TeacherStates(self.model, said, self.folder)

    def teach(self, context: Context, bf16: bool) -> None:
        """Train the head in place. Raises `StageError` where it foretells no more than before."""
        before = self.accepted()
        trainee = Trainee(
            self.head,
            self.windows.train,
            self.loss,
            validate=self.accepted,
            kept=None if processes.several() else KeptTraining(context.scratch),
            stopped=context.remark,
            known=self.head,
        )
        settings = self.settings.training(self.settings.learning_rate, len(self.windows.train), bf16)
        train(trainee, settings, context.seed, context.progress, "eagle3")
        after = self.accepted()
        ahead = self.settings.ahead
        told = f"of {ahead} token{'s'[: ahead > 1]} ahead {before:.2f} -> {after:.2f} are right on held-out windows"
        context.remark(f"eagle3: {told}")
        if not after > before:
            raise StageError(f"Training did not help: {told}.", mend="raise steps, or lower learning_rate")

    @torch.no_grad()
    def said(self, ids: torch.Tensor) -> Said:
        """What the model says of ids [B, L]."""
        found = self.states.of(ids)
        last = found[_LAST]
        rows = self.model.head(last.dtype).to(ids.device)[self.head.tokens]
        shares = (last @ rows.T).float().softmax(-1)
        return Said(found[_HEARD].float(), found[_LIKELIEST], shares)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens as the model's table has them, float32 [B, L, W]; the head reads them so too."""
        table = self.model.causal.get_input_embeddings()
        rows: torch.Tensor = table.grid.rows(ids) if isinstance(table, QuantizedEmbedding) else table.weight[ids]
        return rows.float()

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy to the model's probabilities, of each token ahead; where it would write one the head knows."""
        ids = batch["input_ids"]
        said, counted = self.said(ids), batch.get("labels")
        known = torch.isin(said.likeliest, self.head.tokens).float()
        found: list[torch.Tensor] = module(self.embedded(ids), said.heard, self.settings.ahead)
        total = torch.zeros((), device=ids.device)
        for step, logits in enumerate(found, 1):
            rows = slice(None, ids.shape[1] - step)
            each = known.roll(-step, 1)
            if counted is not None:
                each = each * counted.roll(-step - 1, 1)
            wanted = said.shares.roll(-step, 1)[:, rows]
            loss = -(wanted * logits[:, rows].float().log_softmax(-1)).sum(-1)
            total = total + _FADES ** (step - 1) * (loss * each[:, rows]).sum() / each[:, rows].sum().clamp(min=1)
        return total

    @torch.no_grad()
    def accepted(self) -> float:
        """How many of the tokens ahead the model would take, on average over the places of the held-out windows."""
        counts = []
        for window in self.windows.held_out.inputs:
            ids = torch.from_numpy(window["input_ids"])[None].to(self.head.tokens.device)
            said = self.said(ids)
            right = torch.ones(1, ids.shape[1] - self.settings.ahead)
            found: list[torch.Tensor] = self.head(self.embedded(ids), said.heard, self.settings.ahead)
            total = torch.zeros_like(right)
            for step, logits in enumerate(found, 1):
                same = self.head.tokens[logits.argmax(-1)] == said.likeliest.roll(-step, 1)
                right = right * same[:, : right.shape[1]].cpu()
                total += right
            counts.append(float(total.mean()))
        return float(np.mean(counts))
