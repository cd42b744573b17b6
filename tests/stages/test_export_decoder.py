"""The export stage on checkpoints: a decoder is written, proven on real windows, and says what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.data.dataset import Dataset
from compress.formats.onnx.stage import Onnx
from compress.models.checkpoint import Checkpoint
from compress.stages.base import Context
from compress.tasks.registry import get_task
from compress.utils.errors import DataError, IntegrityError
from compress.utils.progress import SilentProgress

TEXTS = ["a text of no meaning whatever", "another one, which is longer", "and then a third of them"] * 4


class Notes(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def export(checkpoint: Checkpoint, folder: Path, texts: list[str] = TEXTS, **fields: Any) -> tuple[Any, list[str]]:
    task, notes = get_task("text-generation"), Notes()
    data = Dataset(task.columns, {"train": pa.table({"text": texts})}, ())

    def none(label: str) -> Any:
        raise AssertionError(label)

    context = Context(task, data, 32, 0, notes, none, Path, folder / "scratch")
    return Onnx(**fields).run(checkpoint, context), notes.said


def test_a_float_checkpoint_becomes_one_graph_and_the_note_says_how_near_it_is(tmp_path: Path) -> None:
    model, said = export(save_tiny_llama(tmp_path / "source"), tmp_path)
    assert model.file_name == "model.onnx"
    assert len(said) == 1
    assert "from torch in fp32" in said[0]
    assert "8 bits" not in said[0]


def test_of_a_quantized_one_the_note_says_what_rounding_adds(tmp_path: Path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model, said = export(quantized, tmp_path, rounding_limit=0.5)
    assert model.file_name == "model_q4.onnx"
    assert "activations in 8 bits move them by" in said[0]
    with pytest.raises(IntegrityError, match="8 bits"):
        export(quantized, tmp_path, rounding_limit=1e-4)
    _, exact = export(quantized, tmp_path, accuracy_level=1, rounding_limit=1e-4)
    assert "8 bits" not in exact[0]


def test_a_tolerance_that_no_arithmetic_keeps_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="differ from torch"):
        export(save_tiny_llama(tmp_path / "source"), tmp_path, tolerance=1e-12)


def test_text_too_short_for_a_proof_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too short"):
        export(save_tiny_llama(tmp_path / "source"), tmp_path, ["abc"])
