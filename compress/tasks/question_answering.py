"""Extractive question answering: the span of a context that answers a question. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import ANSWERS_PER_TOKEN, HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_PAIRS, TAKES_TEXT
from compress.tasks.classes import agreement_row, cross_entropy, finite, mean_row, outcome_row, required
from compress.tasks.lazy_modules import calibration, losses, np, pa, torch
from compress.tasks.spans import best_span, exact, read_answers, word_f1
from compress.tasks.task import (
    Examples,
    Head,
    NamedArrays,
    Task,
    distill_finetuned,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import load_encoder, ragged, text_inputs
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

START, END = "start_logits", "end_logits"
_ANSWER, _SCORE, _NOTHING, _ROW, _GOLD = "answer", "score", "nothing", "row", "gold"
_OVERLAP = 3
"""Inverse of the overlap of two windows of a long context: a third, as in SQuAD (128 of 384 tokens)."""


@dataclass(frozen=True)
class SpanLogits(Head):
    """Logits of being an answer's first and last token, 0 for padding."""

    outputs: ClassVar[tuple[str, ...]] = (START, END)
    answer: ClassVar[str] = "span_logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return logits [B, 2, L]."""
        both = torch.stack([outputs[START], outputs[END]], dim=1)
        return torch.where(batch["attention_mask"].bool()[:, None], both, torch.zeros((), dtype=both.dtype))


class QuestionAnswering(Task):
    """Hugging Face `question-answering`, extractive as in SQuAD. A context may contain no answer.

    A row gives one example per window of its context. The first windows of all rows come first.
    """

    name = "question-answering"
    columns = (
        Column("question"),
        Column("context"),
        Column(
            "answers",
            given=False,
            read=read_answers,
            expected="a string, a list of strings, or SQuAD's `text` and `answer_start`",
        ),
    )
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, TAKES_PAIRS, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN})
    architectures = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    metrics = ("f1", "exact_match", "agreement")
    app_steps = ("tokenize-pair", "span")
    starter = starter_recipe(
        "my-answerer",
        "a smaller, faster model that finds answers in texts, from my own questions",
        "distilbert/distilbert-base-cased-distilled-squad",
        split_files("jsonl", {name: name for name in ("question", "context", "answers")}, max_length=384),
        {"finetune": {"epochs": 1}, **distill_finetuned(epochs=2), "trim_vocabulary": {}, "onnx": {}, "onnx_int8": {}},
        relative_limit("f1", 0.97),
        baseline="finetune",
    )
    slices = (Slice(length="quartiles"),)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. A missing head is initialized randomly. Raises `ModelError`."""
        return load_encoder(self.name, directory, "QuestionAnswering", None, trust_remote_code)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize in windows; ``labels`` [n, 2] are an answer's first and last token, or those of no answer.

        Raises `DataError` for an answer that is not in its context, or a question that leaves no room for the context.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        questions, contexts = rows["question"].to_pylist(), rows["context"].to_pylist()
        longest = max(len(ids) for ids in processor(questions, add_special_tokens=False)["input_ids"])
        room = max_length - longest - processor.num_special_tokens_to_add(pair=True)
        if room < 2 * _OVERLAP:
            raise DataError(
                f"A question has {longest} tokens, which leaves {max(room, 0)} of {max_length} to its context.",
                where="data.max_length",
                expected="room for a context",
                hint="raise data.max_length",
            )
        encoded = processor(
            questions,
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=room // _OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        inputs, padding = text_inputs(encoded, processor, kinds=True)
        given = [json.loads(value) for value in rows["answers"].to_pylist()] if "answers" in rows.column_names else None
        seen: set[int] = set()
        places: list[list[int]] = []
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = np.array(encoded.sequence_ids(window), dtype=object) == 1
            offsets = np.array(encoded["offset_mapping"][window])
            offsets[~inside] = -1
            inputs[window] |= {
                "offsets": offsets.T,
                "row": np.array(row),
                "later": np.array(row in seen),
                "context": np.array(contexts[row]),
            }
            seen.add(row)
            if given is not None:
                gold = given[row]
                inputs[window]["gold"] = np.array(json.dumps(gold["text"]))
                places.append(_tokens_of(gold, contexts[row], offsets, row))
        order = sorted(range(len(inputs)), key=lambda window: bool(inputs[window]["later"]))
        known = None if given is None else ragged([places[window] for window in order], 0)
        note = f"{len(inputs):,} windows of {len(rows):,} contexts" if len(inputs) > len(rows) else ""
        return Examples([inputs[window] for window in order], padding, known, note=note, head=SpanLogits())

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the first and the last token."""
        ends = (outputs.start_logits, outputs.end_logits)
        first, last = (cross_entropy(logits.float(), labels[:, at].long()) for at, logits in enumerate(ends))
        return (first + last) / 2

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL divergence of both distributions over tokens without padding."""
        padding = taught.eq(0)
        least = torch.finfo(mine.dtype).min / 4
        student_logits, theirs = (logits.masked_fill(padding, least).flatten(0, 1) for logits in (mine, taught))
        return losses.softened_kl(student_logits, theirs, temperature)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the most likely first and last token."""
        ends = (outputs.start_logits, outputs.end_logits)
        return torch.stack([logits.detach().argmax(dim=-1) for logits in ends], dim=-1)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return for each window the best answer, its score, the score of no answer, the row and the references.

        Raises `DataError` for rows without answers, and `ModelError` for logits that are not finite.
        """
        required(examples.labels, "answers", "answers")
        window_answers = finite(examples.answers(outputs, examples.batch(indices)))
        answers, scores = [], []
        for (first, last), index in zip(window_answers, indices, strict=True):
            example = examples.inputs[index]
            starts, ends = example["offsets"]
            length = len(starts)
            at, to, score = best_span(first[:length], last[:length], starts >= 0)
            answers.append(str(example["context"])[starts[at] : ends[to]])
            scores.append(score)
        return {
            _ANSWER: np.array(answers),
            _SCORE: np.array(scores),
            _NOTHING: window_answers[:, 0, 0] + window_answers[:, 1, 0],
            _ROW: np.array([int(examples.inputs[index]["row"]) for index in indices]),
            _GOLD: np.array([str(examples.inputs[index]["gold"]) for index in indices]),
        }

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return exact match and word F1 (Rajpurkar et al. 2016, section 6.1), the best over the references.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        answers = _answers(collected)
        gold = dict(zip(collected[_ROW].tolist(), map(json.loads, collected[_GOLD].tolist()), strict=True))
        pairs = [(answers[row], gold[row] or [""]) for row in sorted(gold)]
        f1 = np.array([max(word_f1(answer, reference) for reference in references) for answer, references in pairs])
        right = np.array([any(exact(answer, reference) for reference in references) for answer, references in pairs])
        return [mean_row("f1", f1, model, target), outcome_row("exact_match", right, model, target)]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the best `answer` in each context, its `score`, and where it `start`s and `end`s in the context.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        nothing: dict[str, Any] = {"answer": "", "score": 0.0, "start": 0, "end": 0}
        best = [(float("-inf"), nothing)] * len(rows)
        for logits, example in zip(answers, examples.inputs, strict=True):
            starts, ends = example["offsets"]
            inside = starts >= 0
            first, last = finite(logits[:, : len(starts)])
            at, to, score = best_span(first, last, inside)
            if best[row := int(example["row"])][0] >= score:
                continue
            # The probability of the span among the tokens of the context, as in transformers' pipeline.
            chances = (calibration.softmax(first[inside]), calibration.softmax(last[inside]))
            places = np.cumsum(inside) - 1
            span = {"score": float(chances[0][places[at]] * chances[1][places[to]])}
            span |= {"start": int(starts[at]), "end": int(ends[to])}
            best[row] = (score, {"answer": str(example["context"])[starts[at] : ends[to]], **span})
        return [answer for _, answer in best]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of answers that equal the baseline's.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        answers, theirs = _answers(collected), _answers(reference)
        return [agreement_row(np.array([answers[row] == theirs[row] for row in sorted(answers)]), model, target)]


def _answers(collected: NamedArrays) -> dict[int, str]:
    """Return the best answer over all windows of each row. It is empty if no answer is allowed and scores higher."""
    allowed = "[]" in collected[_GOLD].tolist()
    best: dict[int, tuple[float, str]] = {}
    nothing: dict[int, float] = {}
    columns = (collected[name].tolist() for name in (_ROW, _SCORE, _ANSWER, _NOTHING))
    for row, score, answer, none in zip(*columns, strict=True):
        best[row] = max(best.get(row, (score, answer)), (score, answer))
        nothing[row] = min(nothing.get(row, none), none)
    return {row: "" if allowed and nothing[row] > score else answer for row, (score, answer) in best.items()}


def _tokens_of(gold: Mapping[str, Any], context: str, offsets: np.ndarray, row: int) -> list[int]:
    """Return first and last token of the first answer that lies within a window, else those of no answer."""
    for text, start in zip(gold["text"], gold["answer_start"], strict=True):
        start = context.find(text) if start is None else start
        if start < 0 or context[start : start + len(text)] != text:
            actual_text = f"; there stands {context[start : start + len(text)]!r}" if start >= 0 else ""
            raise DataError(
                f"The answer {text!r} is not in its context{actual_text}.",
                where=f"row {row + 1}",
                expected="the answer's words as they stand in the context, and where they begin",
                hint="correct the row; this task extracts answers from the context",
            )
        inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
        end = start + len(text)
        if len(inside) and offsets[inside[0], 0] <= start and offsets[inside[-1], 1] >= end:
            return [int(inside[0]), int(inside[-1])]
    return [0, 0]


TASK = QuestionAnswering()
