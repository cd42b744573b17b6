"""Text that a teacher writes itself, for a student that is to say the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from compress.checkpoints.shards import write_whole
from compress.checkpoints.torch_model import TorchModel
from compress.errors import StageError
from compress.tasks.task import Examples
from compress.tasks.windows import spread
from compress.training import processes
from compress.training.lesson_windows import Windows

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from compress.stage.stage import Context

_AT_ONCE = 16
"""Windows that are written together."""
_SHARE = 8
"""Of a window of running text one token in so many is given."""
_IDS = "input_ids"


def rewritten(windows: Windows, count: int, teacher: TorchModel, student: TorchModel, context: Context) -> Windows:
    """``count`` of the windows to learn from, each with what the teacher writes behind its beginning.

    The beginning of running text is an eighth of the window; of a conversation it is all before the first answer. What
    follows are the teacher's likeliest tokens (Kim and Rush 2016, section 3.2), up to its end of text, and they alone
    count. What was written before a kill is not written again. Raises `StageError` where the two have other tokens.
    """
    if teacher.processor.get_vocab() != student.processor.get_vocab():
        raise StageError(
            "The teacher and the student have other tokens, so that one cannot read what the other writes.",
            where="teacher_writes",
            expected="two models of one tokenizer",
            mend="leave teacher_writes out: text can be read by both",
        )
    chosen, marks = spread(len(windows.train), count), windows.train.labels
    texts = [windows.train.inputs[place][_IDS] for place in chosen]
    given = [_given(None if marks is None else marks[place], len(texts[0])) for place in chosen]
    # Those that are given as much are written together, so that few tokens fill up.
    order = sorted(range(len(chosen)), key=given.__getitem__)
    parts = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
    written: dict[int, torch.Tensor] = {}
    for number, places in enumerate(context.progress.track(parts, "the teacher writes", len(parts))):
        file = None if processes.several() else context.scratch / f"written-{number}.safetensors"
        begun = [texts[place][: given[place]] for place in places]
        written |= dict(zip(places, _written(teacher, begun, len(texts[0]), file), strict=True))
    rows = torch.stack([written[place] for place in range(len(chosen))])
    counted = torch.stack([_counted(row, start, _ends(teacher)) for row, start in zip(rows, given, strict=True)])
    context.remark(f"distill: the teacher wrote {int(counted.sum()):,} tokens, behind {len(rows)} beginnings")
    inputs = [{_IDS: row} for row in rows.numpy()]
    return replace(windows, train=Examples(inputs, windows.train.padding, counted.long().numpy()))


def _given(marks: np.ndarray | None, length: int) -> int:
    first = 0 if marks is None or not marks.any() else int(marks.argmax())
    return first or max(1, length // _SHARE)


def _written(teacher: TorchModel, begun: Sequence[np.ndarray], length: int, file: Path | None) -> torch.Tensor:
    """Token ids [texts, length]; ``file`` keeps them."""
    if file is not None and file.is_file():
        kept: torch.Tensor = load_file(file)[_IDS]
        return kept
    longest = max(map(len, begun))
    ids = torch.zeros((len(begun), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(begun):
        ids[row, longest - len(text) :] = torch.from_numpy(text)
        mask[row, longest - len(text) :] = 1
    module, filler = teacher.module.eval(), min(_ends(teacher), default=0)
    room = length - min(map(len, begun))
    with torch.inference_mode():
        found = module.generate(
            input_ids=ids.to(module.device),
            attention_mask=mask.to(module.device),
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=filler,
        ).cpu()
    whole = torch.full((len(begun), longest + room), filler)
    whole[:, : found.shape[1]] = found
    rows = torch.stack([row[longest - len(text) :][:length] for row, text in zip(whole, begun, strict=True)])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, {_IDS: rows}, {})
    return rows


def _counted(row: torch.Tensor, start: int, ends: Collection[int]) -> torch.Tensor:
    """Which tokens the teacher wrote: those from ``start`` up to the first that ends its text."""
    counted = torch.arange(len(row)) >= start
    ended = torch.isin(row, torch.tensor(sorted(ends), dtype=torch.long)) & counted
    # The end itself is written too.
    return counted & (ended.cumsum(0) - ended.long() < 1)


def _ends(teacher: TorchModel) -> set[int]:
    found = teacher.module.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)
