"""Tests of a complete run that quantizes a tiny language model: metrics compared with transformers' own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.json
import pytest
import torch
from tiny_generation import write_all
from tiny_run import Notes, load
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.judged import USUAL, find_instructions
from compress.data.slices import Slice
from compress.pipeline.measurements import data_record
from compress.pipeline.run import Run, run
from compress.pipeline.runner import StageRunner
from compress.report.compare.reports import compare_reports
from compress.tasks.token_sequences import token_ids
from compress.utils.errors import DataError


@dataclass(frozen=True)
class Done:
    """A finished run, its recipe folder, and the notes it printed."""

    run: Run
    folder: Path
    notes: list[str]

    def value(self, model: str, metric: str) -> float:
        row = self.run.report.find(model, metric, "cpu")
        assert row is not None, metric
        return row.value


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("generation")
    limits = [
        {"metric": "perplexity", "at_most": 3, "of": "baseline"},
        {"metric": "speedup_time_per_output_token_context_16", "at_least": 0.01},
    ]
    questions = [{"prompt": "some", "choices": ["words", "meaning"], "answer": number % 2} for number in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    instructions = [{"prompt": "some words", "checks": {name: 0}} for name in ("words_at_least", "words_at_most")]
    (folder / "told.jsonl").write_text("\n".join(map(json.dumps, instructions)))
    files = ("evaluation.questions=questions.jsonl", "evaluation.instructions=told.jsonl", "evaluation.answer_tokens=6")
    recipe = load(write_all(folder, limits=limits), *files)
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    progress = Notes()
    return Done(run(recipe, folder, folder / "artifacts", progress), folder, progress.said)


def test_baseline_perplexity_equals_that_of_source_model(done: Done) -> None:
    """The expected perplexity is transformers' own loss on the same windows of 32 tokens."""
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()
    rows = pyarrow.json.read_json(done.folder / "test.jsonl")
    ids = token_ids(rows, AutoTokenizer.from_pretrained(done.folder / "model"))
    windows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    chosen = [windows[round(position)] for position in np.linspace(0, len(windows) - 1, 6)]
    losses = []
    for window in chosen:
        batch = torch.from_numpy(window)[None]
        with torch.inference_mode():
            losses.append(float(model(batch, labels=batch).loss))
    assert done.value("baseline", "perplexity") == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert any("evaluated on 6 of" in note for note in done.run.report.notes)


def test_the_final_model_is_compared_with_the_baseline(done: Done) -> None:
    assert done.value("baseline", "agreement") == 1.0
    assert done.value("baseline", "kl_divergence") == 0.0
    assert 0 < done.value("final", "kl_divergence") < 5
    assert 0.1 < done.value("final", "agreement") < 1.0
    assert done.value("final", "size_bytes") < done.value("baseline", "size_bytes")
    assert done.value("final", "bits_per_parameter") < 8 < 30 < done.value("baseline", "bits_per_parameter")


def test_generation_speed_and_continuations_are_reported(done: Done) -> None:
    report = done.run.report
    assert done.value("final", "tokens_per_second_context_16") > 0
    assert done.value("baseline", "speedup_time_per_output_token_context_16") == 1.0
    models = ["baseline"] * 2 + ["final"] * 2
    assert [(continuation.model, continuation.target) for continuation in report.continuations] == [
        (model, "cpu") for model in models * 2
    ]
    for continuation in report.continuations:
        assert continuation.prompt and continuation.text
    shares = [continuation.repeated for continuation in report.continuations[:4] if continuation.model == "final"]
    assert done.value("final", "repetition") == pytest.approx(np.mean(shares))


def test_chat_model_is_evaluated_on_answers_of_baseline(done: Done) -> None:
    """The expected value is the perplexity of transformers' own greedy answers to the same prompts."""
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    known = find_instructions(USUAL, done.folder)
    questions, nats = [known[position].prompt for position in (0, len(known) - 1)], []
    for question in questions:
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            whole = model.generate(ids, max_new_tokens=12, do_sample=False)
            chances = torch.log_softmax(model(whole).logits[0, ids.shape[1] - 1 : -1], -1)
        answer = whole[0, ids.shape[1] :]
        nats.append(-float(chances.gather(1, answer[:, None]).mean()))
    assert done.value("baseline", "answer_perplexity") == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    final = done.run.report.find("final", "answer_perplexity", "cpu")
    assert final is not None and final.n == 2 and final.value == pytest.approx(math.exp(np.mean(final.raw)))
    assert final.raw != pytest.approx(nats, rel=1e-3)
    final_prompts = [
        continuation.prompt for continuation in done.run.report.continuations if continuation.model == "final"
    ]
    assert final_prompts[2:] == questions


def test_choice_accuracy_is_measured_for_every_model(done: Done) -> None:
    """Each question occurs with both choices as its correct answer, so that any model gets exactly half right."""
    for model in ("baseline", "final"):
        assert done.value(model, "choice_accuracy") == 0.5
        assert done.value(model, "choice_accuracy_normalized") == 0.5


def test_instruction_following_is_measured_for_every_model(done: Done) -> None:
    """Every answer satisfies "at least 0 words", and no answer satisfies "at most 0 words"."""
    for model in ("baseline", "final"):
        assert (done.value(model, "instructions_followed"), done.value(model, "checks_passed")) == (0.5, 0.5)
    answers = [(answer.model, answer.missed) for answer in done.run.report.answers]
    assert answers == [(model, missed) for model in ("baseline", "final") for missed in ((), ("words at most 0",))]


def test_every_generated_token_has_a_probability(done: Done) -> None:
    for continuation in done.run.report.continuations:
        assert [step.token for step in continuation.steps] == continuation.text.split(" ")
        assert all(0 <= step.probability + step.other_probability <= 1.0002 for step in continuation.steps)
        if continuation.model == "baseline":  # prefill and decode may differ at 4 bits
            assert all(step.probability >= step.other_probability for step in continuation.steps)
    assert 0 <= done.value("final", "looping") <= 1


def test_limits_are_evaluated_with_ratio_and_interval(done: Done) -> None:
    perplexity, speed = done.run.report.limits
    ratio = done.value("final", "perplexity") / done.value("baseline", "perplexity")
    assert perplexity.ratio == pytest.approx(ratio)
    assert perplexity.ratio_low is not None and perplexity.ratio_high is not None
    assert perplexity.ratio_low < ratio < perplexity.ratio_high
    assert perplexity.passed == (ratio <= 3)
    assert speed.passed


def test_second_run_reads_evaluations_from_cache(done: Done) -> None:
    progress = Notes()
    again = run(load(done.folder / "tiny.yaml"), done.folder, done.folder / "artifacts", progress)
    evaluations = ("perplexity", "agreement", "kl_divergence", "repetition")
    for metric in evaluations:
        first, second = (report.find("final", metric, "cpu") for report in (done.run.report, again.report))
        assert first == second
    assert all(stage.cached for stage in again.report.stages)


@pytest.mark.parametrize(
    "change", ["evaluation.windows=5", "evaluation.stride=16", "data.max_length=16", "evaluation.tokens=9"]
)
def test_reports_are_paired_only_when_windows_are_equal(done: Done, change: str) -> None:
    runners = [
        StageRunner(load(done.folder / "tiny.yaml", *given), done.folder, done.folder, Notes())
        for given in ((), (change,))
    ]
    same, other = map(data_record, runners)
    assert same == done.run.report.data
    comparison = compare_reports(done.run.report, done.run.report.model_copy(update={"data": other, "seconds": 0.0}))
    (perplexity,) = (candidate for candidate in comparison.changes if candidate.metric == "perplexity")
    paired = change == "evaluation.tokens=9"  # this setting does not change the evaluation windows
    assert perplexity.method.startswith("paired on 6") is paired
    assert ("own interval" in perplexity.method) is not paired


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ("data.splits.test=short.jsonl", "data.splits", "too few for one window of 32"),
        ("evaluation.stride=33", "evaluation.stride", "leave out tokens"),
        ("data.max_length=300", "data.max_length", "receive 300 tokens"),
        ("benchmark.contexts=[150]", "benchmark.contexts", "timed, and the evaluation text has 64"),
        ("benchmark.tokens=250", "benchmark.contexts", "receive 266 tokens"),
        ("evaluation.tokens=255", "evaluation.tokens", "receive 263 tokens"),
        ("evaluation={instructions: told.jsonl, answer_tokens: 250}", "evaluation.answer_tokens", "receive 260 tokens"),
        (
            "data={splits: {test: test.jsonl, train: train.jsonl, code: short.jsonl}, also: {code: text}}",
            "data.splits",
            "too few for one window",
        ),
        (
            "data={splits: {test: test.jsonl, train: train.jsonl, code: prose.jsonl}, also: {code: python}, "
            "max_length: 32}",
            "data.also, row 1",
            "not valid Python",
        ),
    ],
)
def test_unusable_evaluation_text_fails_before_any_stage(
    done: Done, tmp_path: Path, change: str, where: str, words: str
) -> None:
    (done.folder / "short.jsonl").write_text(json.dumps({"text": "too short"}))
    (done.folder / "prose.jsonl").write_text(json.dumps({"text": "it's no Python (and never ends" * 9}))
    recipe = load(done.folder / "tiny.yaml", "evaluation.windows=2", "limits=[]", change)
    with pytest.raises(DataError, match=words) as caught:
        run(recipe, done.folder, tmp_path, Notes())
    assert caught.value.where == where
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_length_slices_of_running_text_are_rejected(done: Done, tmp_path: Path) -> None:
    recipe = load(done.folder / "tiny.yaml").model_copy(update={"slices": (Slice(length="quartiles"),)})
    with pytest.raises(DataError, match="no slices by length of running text"):
        run(recipe, done.folder, tmp_path, Notes())
