"""Text-to-text generation by encoder-decoders: translation, summarization. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from compress.tasks.classes import cross_entropy, interval_row, mean_row, outcome_row
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.loading import Origin, load_by, tokenizer_by
from compress.tasks.task import Examples, relative_limit, split_files, starter_recipe
from compress.tasks.text_metrics import TextWriting
from compress.tasks.tokens import IGNORED, ragged, text_inputs
from compress.utils.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

DECODER_IDS = "decoder_input_ids"
START = -1
"""Placeholder in ``decoder_input_ids`` for the model's decoder start token, which the tokenizer does not know."""
_RESAMPLES = 1000


class TextToText(TextWriting):
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
    starter = starter_recipe(
        "my-rewriter",
        "a small model that writes text from text, taught on my own pairs",
        "google-t5/t5-small",
        split_files("csv", {"text": "source", "target": "target"}),
        {"finetune": {"epochs": 3}, "onnx": {}, "onnx_int8": {}},
        relative_limit("chrf", 0.97),
        baseline="onnx",
    )
    slices = (Slice(length="quartiles"),)
    batch_size = 8
    metrics = ("chrf", "bleu", "rouge_l", "exact_match", "next_token_accuracy", "agreement")

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the tokenizer. Raises `ModelError` for files that do not load."""
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
        encoded = processor(text=rows["text"].to_pylist(), truncation=True, max_length=max_length)
        inputs, padding = text_inputs(encoded, processor)
        if "target" not in rows.column_names:
            return Examples(inputs, padding)
        targets = processor(text_target=rows["target"].to_pylist(), truncation=True, max_length=max_length)
        target_ids = targets["input_ids"]
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
        examples = self.encode(rows.select(["text"]), processor, labels, max_length)
        targets = np.array(rows["target"].to_pylist()) if "target" in rows.column_names else None
        return replace(examples, labels=targets)

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the target's tokens."""
        logits = outputs.logits.float()
        targets = labels[:, : logits.shape[1]].long()
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def text_rows(self, texts: Sequence[str], references: Sequence[str], model: str, target: str) -> list[Measurement]:
        """Return chrF and BLEU of all texts, ROUGE-L F1 per text, and exact match.

        Popovic 2015, Papineni et al. 2002 and Lin 2004, by sacrebleu and rouge-score; intervals are over texts. A
        single text has no interval of chrF and BLEU.

        Args:
            texts: Generated texts.
            references: Target of each text.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU, CHRF
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "rouge-score" if error.name == "rouge_score" else "sacrebleu", "metrics", "Measuring texts"
            ) from error
        rows, count = [], len(texts)
        for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
            score = metric.corpus_score(texts, [references], n_bootstrap=_RESAMPLES if count > 1 else 1)
            low = high = None
            if count > 1:
                low = min(score.score, score._mean - score._ci) / 100
                high = max(score.score, score._mean + score._ci) / 100
            rows.append(interval_row(name, (score.score / 100, low, high), count, model, target))
        scorer, pairs = RougeScorer(["rougeL"], use_stemmer=False), list(zip(references, texts, strict=True))
        overlap = np.array([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])
        same = np.array([reference == text for reference, text in pairs])
        rows.append(mean_row("rouge_l", overlap, model, target))
        return [*rows, outcome_row("exact_match", same, model, target)]


def _begin(module: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replace `START` by the model's decoder start token."""
    ids = named.get(DECODER_IDS)
    start = module.config.decoder_start_token_id
    return given, named if ids is None else named | {DECODER_IDS: ids.masked_fill(ids == START, start)}


def _corpus_rows(written: list[str], references: list[str], model: str, target: str) -> list[Measurement]:
    """Return chrF and BLEU of all texts. A single text has no interval."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ModuleNotFoundError as error:
        raise MissingExtraError("sacrebleu", "metrics", "BLEU") from error
    rows = []
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = metric.corpus_score(written, [references], n_bootstrap=_RESAMPLES if len(written) > 1 else 1)
        low = high = None
        if len(written) > 1:
            low = min(score.score, score._mean - score._ci) / 100
            high = max(score.score, score._mean + score._ci) / 100
        rows.append(interval_row(name, (score.score / 100, low, high), len(written), model, target))
    return rows


TASK = TextToText()
