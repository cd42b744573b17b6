"""Token classification: a label per word, such as named entities. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column, Spaced
from compress.data.slices import Slice
from compress.tasks.capability import ANSWERS_PER_TOKEN, HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_TEXT
from compress.tasks.classes import agreement_row, cross_entropy, finite, outcome_row, ratio_row, required
from compress.tasks.lazy_modules import calibration, np, pa, torch
from compress.tasks.spans import OUTSIDE, check_schemes, entities, scheme_of
from compress.tasks.task import (
    Examples,
    NamedArrays,
    Task,
    distill_finetuned,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import IGNORED, TokenLogits, load_encoder, ragged, text_inputs, token_distance
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_FOUND, _WANTED = "found", "wanted"


def _words(value: Any) -> str | None:
    """Return a list of words, or a string of them, as a string with single spaces."""
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        raise TypeError
    if not words:
        raise DataError("The sentence is empty.", expected="at least one word", hint="take the row out")
    for word in words:
        if not isinstance(word, str):
            raise TypeError
        word.encode()
        if not word.strip() or len(word.split()) > 1:
            raise DataError(f"The word {word!r} is blank or has white space in it.", expected="words without any")
    return " ".join(word.strip() for word in words)


def _tags(value: Any) -> str | None:
    """Return a list of labels, names or ids, as a string with single spaces."""
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str | int) for tag in tags):
        raise TypeError
    return _words([str(tag) for tag in tags])


class TokenClassification(Task):
    """Hugging Face `token-classification`. The first token of a word predicts its label.

    Texts are tokenized as strings of words separated by spaces, as in an app. Labels that mark entities are evaluated
    by
    entities, others by word.
    """

    name = "token-classification"
    columns = (
        Column("tokens", read=_words, expected="a list of words, or a string with spaces between them"),
        Column("tags", label=True, read=_tags, within=Spaced(), expected="a list of labels, one for each word"),
    )
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN})
    architectures = ("ForTokenClassification",)
    app_steps = ("tokenize", "tag")
    starter = starter_recipe(
        "my-entity-finder",
        "a smaller, faster model that finds names in text, from my own labeled sentences",
        "sample:minilm",
        split_files("jsonl", {"tokens": "tokens", "tags": "ner_tags"}),
        {"finetune": {"epochs": 3}, **distill_finetuned(epochs=5), "trim_vocabulary": {}, "onnx": {}, "onnx_int8": {}},
        relative_limit("f1", 0.98),
        baseline="finetune",
    )
    slices = (Slice(length="quartiles"),)
    ratios = ("f1", "precision", "recall", "token_accuracy")
    metrics = ("f1", "precision", "recall", "exact_match", "token_accuracy", "f1_{label}", "agreement")

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load and `DataError` for unknown labels or another scheme.
        """
        from compress.models.json_file import read_json

        config = read_json(directory / "config.json")
        if labels is not None and any("TokenClassification" in name for name in config.get("architectures") or ()):
            known = config.get("id2label") or {}
            check_schemes([known[key] for key in sorted(known, key=int)], labels)
        return load_encoder(self.name, directory, "TokenClassification", labels, trust_remote_code)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize; ``labels`` [n, positions] are the labels of words at their first token, else -100.

        Labels of words without a token, because the text is truncated or the tokenizer drops them, follow after the
        last
        token. Raises `DataError` for rows whose words and labels differ in number.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        if not processor.is_fast:
            raise ModelError("The tokenizer does not return character offsets.", expected="a fast tokenizer")
        texts = rows["tokens"].to_pylist()
        encoded = processor(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        inputs, padding = text_inputs(encoded, processor)
        head = TokenLogits(None if labels is None else tuple(labels))
        if labels is None or "tags" not in rows.column_names:
            return Examples(inputs, padding, head=head)
        ids = {label: index for index, label in enumerate(labels)}
        placed, lost = [], 0
        sentences = zip(texts, rows["tags"].to_pylist(), encoded["offset_mapping"], strict=True)
        for index, (text, tags, offsets) in enumerate(sentences):
            named = [ids[tag] for tag in tags.split(" ")]
            places = first_tokens(text, offsets)
            if len(named) != len(places):
                raise DataError(
                    f"A row has {len(places)} words and {len(named)} labels: {text[:60]!r}.",
                    where=f"row {index + 1}",
                    expected="one label for each word",
                )
            row = [IGNORED] * max_length
            behind = [tag for tag, position in zip(named, places, strict=True) if position is None]
            for tag, position in zip(named, places, strict=True):
                if position is not None:
                    row[position] = tag
            placed.append(row + behind)
            lost += len(behind)
        note = f"{lost:,} words have no token (texts truncated at {max_length}): no entity predicted" if lost else ""
        return Examples(inputs, padding, ragged(placed, IGNORED), note=note, head=head)

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy over the tokens that have a label."""
        logits = outputs.logits.float()
        return cross_entropy(logits.flatten(0, 1), labels[:, : logits.shape[1]].flatten().long())

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL divergence averaged over tokens."""
        return token_distance(mine, taught, temperature)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return predicted and reference labels of each row's words, [batch] strings.

        Raises `DataError` without labels.
        """
        labels = required(examples.labels, "labels", "tags")
        names = required(getattr(examples.head, "labels", None), "labels", "tags")
        chosen = finite(outputs[examples.answer]).argmax(axis=-1)
        predicted, reference = [], []
        for row, index in enumerate(indices):
            real = np.flatnonzero(labels[index] != IGNORED)
            length = len(examples.inputs[index]["input_ids"])
            reference.append(" ".join(names[labels[index, position]] for position in real))
            predicted.append(
                " ".join(names[chosen[row, position]] if position < length else OUTSIDE for position in real)
            )
        return {_FOUND: np.array(predicted), _WANTED: np.array(reference)}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return entity F1, precision and recall (Tjong Kim Sang and De Meulder 2003), and accuracy of rows and words.

        Intervals are over rows. If labels mark no entities, only accuracy is returned.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        pairs = [
            (predicted.split(" "), reference.split(" "))
            for predicted, reference in zip(collected[_FOUND].tolist(), collected[_WANTED].tolist(), strict=True)
        ]
        right = np.array([sum(map(str.__eq__, *pair)) for pair in pairs])
        words = np.array([len(reference) for _, reference in pairs])
        by_word = ratio_row("token_accuracy", right, words, model, target)
        whole = outcome_row("exact_match", right == words, model, target)
        if scheme_of({label for pair in pairs for part in pair for label in part}) is None:
            return [by_word, whole]
        sets = [(entities(predicted), entities(reference)) for predicted, reference in pairs]
        hits = np.array([len(predicted & reference) for predicted, reference in sets])
        given, real = (np.array([len(pair[side]) for pair in sets]) for side in (0, 1))
        kinds = sorted({entity.kind for _, reference in sets for entity in reference})
        return [
            ratio_row("f1", 2 * hits, given + real, model, target),
            ratio_row("precision", hits, given, model, target),
            ratio_row("recall", hits, real, model, target),
            whole,
            by_word,
            *(_of_kind(kind, sets, model, target) for kind in kinds if len(kinds) > 1),
        ]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return `word`, `label` and `score` of each word in a row. A word without a token is outside of all entities.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        names, predictions = required(labels, "labels", "tags"), []
        for text, example, logits in zip(rows["tokens"].to_pylist(), examples.inputs, answers, strict=True):
            length = len(example["input_ids"])
            encoded = processor(text, truncation=True, max_length=length, return_offsets_mapping=True)
            probabilities, words = calibration.softmax(finite(logits[:length])), []
            for word, token in zip(text.split(" "), first_tokens(text, encoded["offset_mapping"]), strict=True):
                row = None if token is None else probabilities[token]
                label, score = (OUTSIDE, 0.0) if row is None else (names[int(row.argmax())], float(row.max()))
                words.append({"word": word, "label": label, "score": score})
            predictions.append(words)
        return predictions

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of rows for which both models predict the same labels.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        return [agreement_row(collected[_FOUND] == reference[_FOUND], model, target)]


def first_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the first token of each word of ``text`` (words separated by one space), or None for a word without token.

    The space before a word counts as part of it, as in byte-level and SentencePiece tokenizers.
    """
    ends, at = [], 0
    for part in text.split(" "):
        at += len(part) + 1
        ends.append(at - 1)
    tokens: list[int | None] = [None] * len(ends)
    word = 0
    for token, (start, end) in enumerate(offsets):
        if end == 0:  # a special token, which stands nowhere
            continue
        while word < len(ends) and ends[word] <= start:
            word += 1
        if word < len(ends) and tokens[word] is None:
            tokens[word] = token
    return tokens


def _of_kind(kind: str, sets: Sequence[tuple[Any, Any]], model: str, target: str) -> Measurement:
    entities_of_kind = [tuple({entity for entity in side if entity.kind == kind} for side in pair) for pair in sets]
    hits = np.array([len(predicted & reference) for predicted, reference in entities_of_kind])
    row = ratio_row(f"f1_{kind}", 2 * hits, np.array([len(a) + len(b) for a, b in entities_of_kind]), model, target)
    return row.model_copy(update={"raw": None})


TASK = TokenClassification()
