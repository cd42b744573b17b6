"""A vision-language model's folder opens unmodified in transformers.js, which answers as transformers does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import tiny_questions
import torch

from compress.formats.onnx.decoder import GraphSettings, export_image_reader
from compress.models.checkpoint import Checkpoint
from compress.tasks.evaluation import Evaluation
from compress.tasks.image_text_to_text import TASK

SCRIPT = Path(__file__).with_name("tell_of_image.mjs")
ROWS, NEW_TOKENS = 4, 8


@pytest.mark.slow
def test_answers_are_those_of_transformers(library: Path, tmp_path: Path) -> None:
    source = tiny_questions.write_model(tmp_path / "source")
    model = TASK.load(source, None, trust_remote_code=False)
    examples = TASK.eval_examples(tiny_questions.table(ROWS, seed=3), model.processor, None, 64, Evaluation())
    taught = TASK.encode(tiny_questions.table(2), model.processor, None, 64)
    (tmp_path / "out").mkdir()
    export_image_reader(Checkpoint(source), taught, GraphSettings(), 1e-4).model.save(tmp_path / "out")
    batches = [examples.batch([row]) for row in range(ROWS)]
    jobs = [
        {
            "ids": batch["input_ids"][0].tolist(),
            "pixels": batch["pixel_values"].ravel().tolist(),
            "dims": list(batch["pixel_values"].shape),
        }
        for batch in batches
    ]
    command = ["node", str(SCRIPT), str(library), str(tmp_path), "out", "fp32", json.dumps(jobs), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for batch, answer in zip(batches, json.loads(done.stdout), strict=True):
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.inference_mode():
            generated = model.module.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
        assert answer == generated[0].tolist()
