"""Text-to-text generation by encoder-decoders: translation, summarization. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import (
    EXPORTED_FROM_CHECKPOINT,
    HAS_LABELS,
    PREDICTS_TOKENS,
    READS_ROWS,
    REWRITES,
    TAKES_TEXT,
)
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.utils.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

DECODER_IDS = "decoder_input_ids"
START = -1
"""Placeholder in ``decoder_input_ids`` for the model's decoder start token, which the tokenizer does not know."""
_RESAMPLES = 1000

_STARTER: dict[str, object] = {
    "name": "my-rewriter",
    "description": "a small model that writes text from text, taught on my own pairs",
    "model": "google-t5/t5-small",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "source", "target": "target"},
    },
    "stages": [{"finetune": {"epochs": 3}}, {"onnx": {}}, {"onnx_int8": {}}],
    "baseline": "onnx",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "chrf", "at_least": 0.97, "of": "baseline"}],
}


class TextToText(Task):
    """Hugging Face `text2text-generation`: T5, BART, Marian and similar models, evaluated by their generated texts.

    Generation follows the model's generation_config.json, greedy or by beam search.
    """

    name = "text2text-generation"
    columns = (Column("text"), Column("target"))
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_LABELS, PREDICTS_TOKENS, EXPORTED_FROM_CHECKPOINT, REWRITES})
    architectures = (
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "PegasusForConditionalGeneration",
        "MarianMTModel",
        "EncoderDecoderModel",
    )
    app_steps = ("tokenize", "rewrite")
    starter = _STARTER
    slices = (Slice(length="quartiles"),)
    batch_size = 8

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the tokenizer. Raises `ModelError` for files that do not load."""
        import torch

        from compress.tasks.loading import Origin, load_by, tokenizer_by

        expected = "an encoder with a decoder and a tokenizer, in Hugging Face layout"
        origin = Origin(self.name, directory, tokenizer_by(trust_remote_code), expected)
        model = load_by("AutoModelForSeq2SeqLM", origin, trust_remote_code, dtype=torch.float32)
        model.module.register_forward_pre_hook(_begin, with_kwargs=True)
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize; ``labels`` [n, longest] are the target's tokens padded with -100, if there are targets.

        ``decoder_input_ids`` are the preceding tokens, with `START` before the first.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        import numpy as np

        from compress.tasks.tokens import IGNORED, ragged, text_inputs

        inputs, padding = text_inputs(_tokens(processor, max_length, text=rows["text"].to_pylist()), processor)
        if "target" not in rows.column_names:
            return Examples(inputs, padding)
        target_ids = _tokens(processor, max_length, text_target=rows["target"].to_pylist())["input_ids"]
        for example, ids in zip(inputs, target_ids, strict=True):
            example[DECODER_IDS] = np.array([START, *ids[:-1]], dtype=np.int64)
        return Examples(inputs, padding | {DECODER_IDS: padding["input_ids"]}, ragged(target_ids, IGNORED))

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return every row, with its target as text.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
        """
        import numpy as np

        from compress.tasks.tokens import text_inputs

        inputs, padding = text_inputs(_tokens(processor, max_length, text=rows["text"].to_pylist()), processor)
        targets = np.array(rows["target"].to_pylist()) if "target" in rows.column_names else None
        return Examples(inputs, padding, targets)

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the target's tokens."""
        from compress.tasks.classes import cross_entropy

        logits = outputs.logits.float()
        targets = labels[:, : logits.shape[1]].long()
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Return the generated texts, or losses of the targets. See `keep_texts`."""
        from compress.tasks.text_metrics import keep_texts

        return keep_texts(outputs, examples, indices)

    def measure(
        self, collected: CollectedOutputs, labels: np.ndarray | None, model: str, target: str
    ) -> list[Measurement]:
        """Return chrF and BLEU of all texts, ROUGE-L F1 per text, and exact match.

        Popovic 2015, Papineni et al. 2002 and Lin 2004, by sacrebleu and rouge-score; intervals are over texts.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        from compress.tasks.classes import mean_row, outcome_row
        from compress.tasks.text_metrics import TEXTS, next_token_row, stripped

        if TEXTS not in collected:
            return [next_token_row(collected, model, target)]
        import numpy as np

        assert labels is not None, "keep asks for targets"
        written, references = stripped(collected[TEXTS]), stripped(labels)
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            raise MissingExtraError("rouge-score", "metrics", "ROUGE") from error
        scorer = RougeScorer(["rougeL"], use_stemmer=False)
        overlap = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, written, strict=True)]
        same = np.array([text == other for text, other in zip(written, references, strict=True)])
        return [
            *_corpus_rows(written, references, model, target),
            mean_row("rouge_l", np.array(overlap), model, target),
            outcome_row("exact_match", same, model, target),
        ]

    def compare(
        self, collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """Return the share of texts that equal the baseline's.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        from compress.tasks.text_metrics import same_texts

        return same_texts(collected, reference, model, target)

    def probabilities(self, collected: CollectedOutputs) -> np.ndarray | None:
        """Return None: texts are no classes."""
        return None


def _begin(module: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replace `START` by the model's decoder start token."""
    ids = named.get(DECODER_IDS)
    start = module.config.decoder_start_token_id
    return given, named if ids is None else named | {DECODER_IDS: ids.masked_fill(ids == START, start)}


def _tokens(processor: Processor, max_length: int, **texts: list[str]) -> Mapping[str, Any]:
    encoded: Mapping[str, Any] = processor(**texts, truncation=True, max_length=max_length)
    return encoded


def _corpus_rows(written: list[str], references: list[str], model: str, target: str) -> list[Measurement]:
    from compress.results.report import Measurement

    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ModuleNotFoundError as error:
        raise MissingExtraError("sacrebleu", "metrics", "BLEU") from error
    rows = []
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = metric.corpus_score(written, [references], n_bootstrap=_RESAMPLES if len(written) > 1 else 1)
        known = {}
        if len(written) > 1:
            known = {
                "low": min(score.score, score._mean - score._ci) / 100,
                "high": max(score.score, score._mean + score._ci) / 100,
            }
        value = score.score / 100
        rows.append(
            Measurement(model=model, metric=name, target=target, value=value, unit="ratio", n=len(written), **known)
        )
    return rows


TASK = TextToText()
