"""Text that a teacher writes itself, for a student that is to say the same."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.formats.generation.decoder import ManyTexts
from compress.formats.registry import RUNTIMES
from compress.formats.spec import load
from compress.models.config_checks import max_positions
from compress.models.model import TorchModel
from compress.models.safetensors_file import write_whole
from compress.stages.base import Context
from compress.stages.training import processes
from compress.stages.training.sequences import TokenSequences
from compress.stages.training.settings import TORCH, TeacherWrites
from compress.tasks.task import Examples
from compress.tasks.token_sequences import before_question, cut, prefix_tokens, render_question
from compress.utils.errors import DataError, StageError
from compress.utils.torch_device import CPU

_AT_ONCE, _CACHE_BYTES = 64, 2e9
"""Texts that are written together, at most, and what their keys and values may take."""
_QUESTION, _ANSWER = 64, 256
"""Longest of a conversation, in tokens."""
_IDS, _SECONDS = "input_ids", "seconds"
_MANY = 256
"""Texts that another runtime is given together; some of them it writes at once."""


def with_synthetic_text(
    windows: TokenSequences,
    settings: TeacherWrites,
    teacher: TorchModel,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    bf16: bool = False,
) -> tuple[TokenSequences, float]:
    """Return training sequences of which the teacher wrote a share, and the seconds that this took.

    The teacher makes up conversations: it draws a question from what its chat template has before one, and its
    likeliest answer follows (Xu et al. 2024, Magpie, section 2.1). They are repeated as often as the share takes. A
    resumed run does not generate text again.

    Args:
        windows: Sequences of the recipe's text.
        settings: Number of conversations, their share of the sequences, and the runtime.
        teacher: Model that writes.
        tokenizer: Tokenizer of the student.
        context: Context of the stage.
        bf16: Let a copy of the teacher in bfloat16 write.

    Raises:
        StageError: The two models have different tokens.
        DataError: There is no chat template, or the conversations are shorter than one sequence.
    """
    if teacher.processor.get_vocab() != tokenizer.get_vocab():
        raise StageError(
            "The teacher and the student have different tokenizers.",
            where="teacher_writes",
            expected="two models with the same tokenizer",
            hint="leave teacher_writes out: text can be read by both",
        )
    writer = _Writer(teacher, context, bf16)
    if settings.runtime != TORCH:
        writer = _RuntimesWriter(teacher, context, bf16, settings.runtime)
    train, labels = windows.train, None
    sequences = _conversations(settings.conversations, len(train.inputs[0][_IDS]), writer)
    if settings.share < 1:
        count = round(len(train) * settings.share / (1 - settings.share))
        repeated = [sequences[position % len(sequences)] for position in range(count)]
        if train.labels is not None:
            # All tokens of a conversation count.
            labels = np.concatenate([train.labels, np.ones((count, train.labels.shape[1]), np.int64)])
        sequences = [*(example[_IDS] for example in train.inputs), *repeated]
    examples = Examples([{_IDS: ids} for ids in sequences], train.padding, labels)
    return replace(windows, train=examples), writer.seconds


def _conversations(count: int, length: int, writer: _Writer) -> list[np.ndarray]:
    """Return sequences of conversations that follow each other; answers without an end are left out if others have."""
    tokenizer = writer.teacher.processor

    def encoded(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)[_IDS], np.int64)

    prefix = encoded(before_question(tokenizer))
    drawn = writer.write("questions", [prefix] * count, [_QUESTION] * count, temperature=1.0)
    questions = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn]
    prompts = [encoded(render_question(question, tokenizer)) for question in questions if question]
    answers = writer.write("answers", prompts, [_ANSWER] * len(prompts))
    whole = [pair for pair in zip(prompts, answers, strict=True) if writer.ends(pair[1])]
    # Who reads answers that were broken off learns to come to no end.
    conversations = list(chain.from_iterable(whole or zip(prompts, answers, strict=True)))
    windows = cut(np.concatenate(conversations), prefix_tokens(tokenizer), length) if conversations else []
    if not len(windows):
        raise DataError(
            f"{count} conversations of the teacher are {sum(map(len, conversations))} tokens, and a window has "
            f"{length}.",
            where="teacher_writes.conversations",
            expected="more of them, or a smaller sequence_length",
        )
    return windows


class _Writer:
    """A teacher that goes on with texts, some at a time; what it wrote lies in the stage's scratch folder.

    Each of several processes writes some of them.
    """

    def __init__(self, teacher: TorchModel, context: Context, bf16: bool) -> None:
        ends = teacher.module.generation_config.eos_token_id
        self.teacher, self._context, self._bf16 = teacher, context, bf16
        self._positions = max_positions(teacher.module.config.to_dict())
        self._ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self.filler = min(self._ends, default=0)
        self.seconds = 0.0
        """That it has written for, in this run and before a kill."""

    def write(
        self, what: str, begun: Sequence[np.ndarray], room: Sequence[int], temperature: float | None = None
    ) -> list[np.ndarray]:
        """Token ids behind each beginning, at most as many as there is ``room``, up to the end of the text, with it.

        The likeliest, or drawn at a ``temperature``.
        """
        # Those that are as long are written together, so that few tokens fill up.
        order = sorted(range(len(begun)), key=lambda position: len(begun[position]))
        size = self._at_once(max((len(prompt) + more for prompt, more in zip(begun, room, strict=True)), default=1))
        size = max(1, min(size, -(-len(order) // processes.num_processes())))
        parts = list(enumerate(order[start : start + size] for start in range(0, len(order), size)))
        mine = [part for part in parts if processes.is_mine(part[0])]
        generated: dict[int, np.ndarray] = {}
        for number, places in self._context.progress.track(mine, f"the teacher generates {what}", len(mine)):
            texts, most = [begun[position] for position in places], max(room[position] for position in places)
            if self._positions is not None:
                most = min(most, self._positions - max(map(len, texts)))
            rows = self._kept(f"{what}-{size}-{number}", partial(self._written, texts, most, number, temperature))
            generated |= {position: row[: room[position]] for position, row in zip(places, rows, strict=True)}
        generated = processes.together(generated)
        total = sum(map(len, generated.values()))
        self._context.note(f"the teacher generated {total:,} tokens, {len(generated)} {what}")
        return [generated[position] for position in range(len(begun))]

    @cached_property
    def _module(self) -> PreTrainedModel:
        module = self.teacher.module.eval()
        is_lowered = self._bf16 and module.dtype != torch.bfloat16
        return copy.deepcopy(module).to(torch.bfloat16) if is_lowered else module

    def _at_once(self, tokens: int) -> int:
        """Return how many texts of so many tokens fit, as if each head had keys and values of its own in float32."""
        config = self.teacher.module.config.get_text_config()
        bytes_per_text = 4 * 2 * config.num_hidden_layers * config.hidden_size * tokens
        return max(1, min(_AT_ONCE, int(_CACHE_BYTES // bytes_per_text)))

    def _kept(self, name: str, make: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        file = self._context.scratch / f"written-{name}.safetensors"
        if not file.is_file():
            began = time.monotonic()
            rows = {str(index): torch.from_numpy(row) for index, row in enumerate(make())}
            seconds = time.monotonic() - began
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, rows, {_SECONDS: str(seconds)})
        with safe_open(file, framework="np") as stored_rows:
            self.seconds += float(stored_rows.metadata()[_SECONDS])
            return [stored_rows.get_tensor(str(index)) for index in range(len(stored_rows.keys()))]

    def _written(
        self, begun: Sequence[np.ndarray], room: int, number: int, temperature: float | None
    ) -> list[np.ndarray]:
        chosen: dict[str, Any] = {} if temperature is None else {"temperature": temperature, "top_k": 0}
        longest = max(map(len, begun))
        ids = torch.full((len(begun), longest), self.filler)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(begun):
            ids[row, longest - len(text) :] = torch.from_numpy(text)
            mask[row, longest - len(text) :] = 1
        module = self._module
        given = {"input_ids": ids.to(module.device), "attention_mask": mask.to(module.device)}
        others = [] if module.device.type == CPU else [module.device]
        with torch.inference_mode(), torch.random.fork_rng(others, device_type=module.device.type):
            torch.manual_seed(self._context.seed + number)
            output_ids = module.generate(
                **given, max_new_tokens=room, pad_token_id=self.filler, do_sample=temperature is not None, **chosen
            )
        texts = [row[longest:].cpu().numpy() for row in output_ids]
        # Each text ends with its first end token.
        ended = [np.isin(ids, sorted(self._ends)) for ids in texts]
        return [ids[: int(end.argmax()) + 1] if end.any() else ids for ids, end in zip(texts, ended, strict=True)]

    def ends(self, ids: np.ndarray) -> bool:
        """Return whether a generated text came to its end."""
        return bool(len(ids)) and int(ids[-1]) in self._ends


class _RuntimesWriter(_Writer):
    """Text generation by another runtime than torch."""

    def __init__(self, teacher: TorchModel, context: Context, bf16: bool, runtime: str) -> None:
        super().__init__(teacher, context, bf16)
        reference = RUNTIMES[runtime].many_texts
        assert reference is not None
        self._runtime = runtime
        self._open: Callable[..., ManyTexts] = load(reference)

    @cached_property
    def _texts(self) -> ManyTexts:
        from compress.formats.onnx.stage import comparison_sequences
        from compress.models.checkpoint import Checkpoint
        from compress.utils.environment import working_threads

        self._context.scratch.mkdir(parents=True, exist_ok=True)
        # What is open is read from there, by mapping; the files themselves may go.
        with tempfile.TemporaryDirectory(dir=self._context.scratch) as folder:
            self.teacher.save(saved := Path(folder) / "teacher")
            checkpoint = Checkpoint(saved)
            windows = comparison_sequences(checkpoint, self._context)
            try:
                return self._open(
                    checkpoint, Path(folder) / "graph", windows, working_threads(), self._bf16, self._ends
                )
            except StageError as error:
                raise StageError(
                    f"{self._runtime} doesn't run the teacher. {error.what}",
                    where="teacher_writes.runtime",
                    hint="remove runtime: torch generates instead, more slowly",
                ) from error

    def _at_once(self, tokens: int) -> int:
        return _MANY

    def _written(
        self, begun: Sequence[np.ndarray], room: int, number: int, temperature: float | None
    ) -> list[np.ndarray]:
        return self._texts.write(begun, room, temperature, self._context.seed + number)
