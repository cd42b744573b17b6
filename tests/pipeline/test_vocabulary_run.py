"""Tests of a complete run of a student with a smaller vocabulary: comparable metrics, and the notes on them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from mergeable import TEXTS, save_mergeable_llama
from tiny_generation import ONE_LAUNCH, write_recipe
from tiny_run import Notes, load

from compress.models.model import TorchModel
from compress.models.vocabulary import trim
from compress.pipeline.run import run
from compress.report.compare.reports import compare_reports
from compress.report.pages import html_page
from compress.tasks.text_generation import TASK

TRAIN = "The cat's hat sat on the mat, and the cat on the cat."
CODE = """def area(width, height=2):  # in metres
    if width < 0:
        raise ValueError("a width below 0")
    return width * height + 10
"""
STAGES = [
    {"distill_language_model": {"student": {"model": "student"}, "tokens": 64, "batch_size": 1, "precision": "fp32"}},
    {"gptq": {"bits": 8, "group_size": 32, "method": "rtn", "embedding_bits": 8}},
    {"onnx": {"rounding_limit": 0.5}},
]


@pytest.mark.filterwarnings("ignore:Tracing")
@pytest.mark.slow
def test_student_with_smaller_vocabulary_is_compared_on_same_text(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "model")
    student = TorchModel.load(source.folder, TASK)
    trim(student, student.processor(TRAIN)["input_ids"])
    student.save(tmp_path / "student")
    for split, texts in (("train", [TRAIN] * 4), ("test", [*TEXTS[:2] * 3, *TEXTS[2:] * 3])):
        rows = [{"text": text, "domain": "prose" if text in TEXTS[:2] else "code"} for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "code.jsonl").write_text("\n".join(json.dumps({"text": CODE}) for _ in range(6)))
    slices = [{"column": "domain", "min_rows": 1}]
    splits = {name: f"{name}.jsonl" for name in ("train", "test", "code")}
    data = {"splits": splits, "max_length": 32, "also": {"code": "python"}}
    recipe = load(write_recipe(tmp_path, stages=STAGES, benchmark=ONE_LAUNCH, slices=slices, data=data))
    report = run(recipe, tmp_path, tmp_path / "a", Notes()).report
    measured = {
        (model, metric): report.find(model, metric, "cpu")
        for model in ("baseline", "final")
        for metric in ("perplexity", "bits_per_byte", "agreement", "next_token_accuracy", "size_bytes")
    }
    raws = [measured[model, "perplexity"].raw for model in ("baseline", "final")]
    bits = [measured[model, "bits_per_byte"].raw for model in ("baseline", "final")]
    # Windows are equal, so nats per baseline token and bits per byte differ by the same factor for both models.
    assert len(raws[0]) == len(raws[1]) == 6
    for position in range(6):
        assert raws[0][position] / bits[0][position] == pytest.approx(raws[1][position] / bits[1][position])
    assert measured["final", "perplexity"].value == pytest.approx(math.exp(np.mean(raws[1])))
    assert measured["final", "agreement"] is measured["final", "next_token_accuracy"] is None
    assert (
        measured["baseline", "next_token_accuracy"]
        and measured["final", "size_bytes"].value < measured["baseline", "size_bytes"].value
    )
    for name in ("prose", "code"):
        rows_of_slice = report.slices[f"domain={name}"].indices()
        for model, raw in zip(("baseline", "final"), raws, strict=True):
            part = report.find(model, f"perplexity[domain={name}]", "cpu")
            assert part.value == pytest.approx(math.exp(np.mean([raw[position] for position in rows_of_slice])))
    page = html_page(report)
    assert "prose" in page and "code, identifier" in page
    note, code_note = (note for note in report.notes if "a vocabulary of" in note)
    assert code_note.startswith("code: evaluated on 6 of 19 windows")
    assert "perplexity is per token of the baseline" in note
    prompts = [
        [continuation.prompt for continuation in report.continuations if continuation.model == model]
        for model in ("baseline", "final")
    ]
    # Two texts to continue and two questions, encoded with each model's own tokenizer.
    assert prompts[0] == prompts[1] and len(prompts[0]) == 4
    answers = [report.find(model, "answer_perplexity", "cpu") for model in ("baseline", "final")]
    assert all(row is not None and row.n == 2 and 1 < row.value < math.inf for row in answers)
    changes = {change.metric: change for change in compare_reports(report, report, baseline_model="baseline").changes}
    kinds = {name for name in changes if name.startswith("perplexity_on_code[")}
    assert {f"perplexity_on_code[{kind}]" for kind in ("identifier", "comment", "whitespace")} <= kinds
    for name in ("perplexity_on_code", *kinds):
        assert changes[name].n == 6 and changes[name].method.startswith("paired bootstrap over 6 windows")
        assert changes[name].effect == pytest.approx(changes[name].candidate / changes[name].baseline - 1)
    data = report.data.model_copy(update={"also": {"code": "another digest"}})
    other = compare_reports(report, report.model_copy(update={"data": data}))
    methods = {change.metric: change.method for change in other.changes}
    assert methods["perplexity"].startswith("paired") and methods["perplexity_on_code"].startswith("each side's own")
