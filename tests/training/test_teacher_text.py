"""What a teacher writes for its student: transformers' own greedy text, behind the beginnings alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal import LENGTH, context
from pydantic import ValidationError
from quantized import save_tiny_llama

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.torch_model import TorchModel
from compress.errors import StageError
from compress.stages.distill import Distill
from compress.tasks.registry import get_task
from compress.tasks.task import Examples
from compress.training import teacher_text
from compress.training.lesson_windows import Windows, lesson_windows
from compress.training.teacher_text import rewritten

TASK = get_task("text-generation")
STAGE = Distill(teacher="start", batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tiny_llama(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def teacher(source: Checkpoint) -> TorchModel:
    return TorchModel.load(source.folder, TASK)


@pytest.fixture
def windows(source: Checkpoint, teacher: TorchModel, tmp_path: Path) -> Windows:
    return lesson_windows(teacher.processor, STAGE, context(source, tmp_path))


def alone(teacher: TorchModel, beginning: np.ndarray) -> list[int]:
    """What transformers writes behind one beginning, not batched, token by token without its `generate`."""
    ids = beginning.tolist()
    while len(ids) < LENGTH:
        with torch.no_grad():
            logits = teacher.module(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


def test_running_text_is_gone_on_with_behind_its_eighth(
    windows: Windows, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_text, "_AT_ONCE", 4)
    teacher.module.generation_config.eos_token_id = None
    made = context(source, tmp_path)
    found = rewritten(windows, 6, teacher, teacher, made)
    assert len(found.train) == 6 and found.held_out is windows.held_out and found.train.labels is not None
    first, last = windows.train.inputs[0]["input_ids"], windows.train.inputs[-1]["input_ids"]
    for place, text in ((0, first), (-1, last)):
        written = found.train.inputs[place]["input_ids"].tolist()
        assert written == alone(teacher, text[: LENGTH // 8]) != text.tolist()
    assert (found.train.labels.sum(1) == LENGTH - LENGTH // 8).all() and not found.train.labels[:, : LENGTH // 8].any()
    assert made.remarks == [f"distill: the teacher wrote {6 * (LENGTH - LENGTH // 8)} tokens, behind 6 beginnings"]


def test_of_a_conversation_all_before_the_answer_is_given(
    windows: Windows, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    teacher.module.generation_config.eos_token_id = None
    marks = np.zeros((3, LENGTH), np.int64)
    for row, start in enumerate((9, 3, LENGTH - 1)):
        marks[row, start:] = 1
    three = Examples(list(windows.train.inputs[:3]), {"input_ids": 0}, marks)
    found = rewritten(replace(windows, train=three), 3, teacher, teacher, context(source, tmp_path)).train
    for row, start in enumerate((9, 3, LENGTH - 1)):
        assert found.inputs[row]["input_ids"].tolist() == alone(teacher, three.inputs[row]["input_ids"][:start])
    assert np.array_equal(found.labels, marks)


def test_nothing_counts_behind_the_end_of_a_text(
    windows: Windows, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    beginning = windows.train.inputs[0]["input_ids"][: LENGTH // 8]
    plain = alone(teacher, beginning)
    end = plain[LENGTH // 8 + 3]
    stops = plain.index(end, LENGTH // 8)
    teacher.module.generation_config.eos_token_id = [end]
    found = rewritten(windows, 5, teacher, teacher, context(source, tmp_path)).train
    assert found.inputs[0]["input_ids"][: stops + 1].tolist() == plain[: stops + 1]
    assert found.labels is not None
    assert np.flatnonzero(found.labels[0]).tolist() == list(range(LENGTH // 8, stops + 1))


def test_what_was_written_before_a_kill_is_not_written_again(
    windows: Windows, teacher: TorchModel, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_text, "_AT_ONCE", 4)
    made, plain, calls = context(source, tmp_path), teacher.module.generate, 0

    def killed(**given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(**given)

    monkeypatch.setattr(teacher.module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        rewritten(windows, 8, teacher, teacher, made)
    again = rewritten(windows, 8, teacher, teacher, made)
    assert calls == 3
    whole = rewritten(windows, 8, teacher, teacher, context(source, tmp_path / "another"))
    for one, other in zip(again.train.inputs, whole.train.inputs, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])


def test_the_stage_learns_from_it(source: Checkpoint, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"teacher": "start", "student": {"layers": [0]}, "batch_size": 4, "learning_rate": 3e-3}
    lesson = {**fields, "precision": "fp32", "temperature": 1.0, "teacher_writes": 16, "tokens": 20 * 4 * LENGTH}
    made = context(source, tmp_path)
    Distill.model_validate(lesson).run(TorchModel.load(source.folder, TASK), made)
    assert any("behind 16 beginnings" in said for said in made.remarks)
    (curve,) = (table.rows for table in made.tables)
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_who_cannot_read_what_the_other_writes_is_refused(
    windows: Windows, teacher: TorchModel, source: Checkpoint, tmp_path: Path
) -> None:
    other = TorchModel.load(source.folder, TASK)
    other.processor.add_tokens(["another"])
    with pytest.raises(StageError, match="other tokens") as refused:
        rewritten(windows, 4, teacher, other, context(source, tmp_path))
    assert refused.value.where == "teacher_writes"
    with pytest.raises(ValidationError, match="at least batch_size, 4"):
        Distill(teacher="start", batch_size=4, teacher_writes=3)
