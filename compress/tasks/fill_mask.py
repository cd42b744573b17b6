"""Fill-mask: prediction of masked tokens from their context. Importing this imports no torch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    HAS_CLASSES,
    PREDICTS_TOKENS,
    READS_ROWS,
    SINGLE_CALL,
    TAKES_TEXT,
)
from compress.tasks.classes import agreement_row, cross_entropy, finite, ratio_row
from compress.tasks.lazy_modules import calibration, np, pa, token_metrics, torch
from compress.tasks.task import (
    LOGITS,
    Examples,
    Head,
    NamedArrays,
    Task,
    distill_finetuned,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.tokens import IGNORED, load_encoder, ragged, text_inputs, token_distance
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_LOSS, _RANK, _FIRST = "loss", "rank", "first"
_SHARE = 0.15
"""Share of a text's tokens that are masked, at least one (Devlin et al. 2019, section 3.1)."""
_NONE = -1
_MOST_LIKELY = 5
"""Number of tokens that are predicted for a mask."""


@dataclass(frozen=True)
class MaskedLogits(Head):
    """Logits of the masked tokens of each text in order, padded with zeros."""

    mask_id: int
    answer: ClassVar[str] = "masked_logits"
    answer_label: ClassVar[str] = "logits of masked tokens"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return logits [B, most masked tokens of a text, vocabulary]."""
        logits = outputs[LOGITS]
        masked = batch["input_ids"] == self.mask_id
        most = max(int(masked.sum(dim=1).max()), 1)
        order = torch.argsort((~masked).to(torch.uint8), dim=1, stable=True)[:, :most]
        real = torch.gather(masked, 1, order)[..., None]
        masked_logits = torch.gather(logits, 1, order[..., None].expand(-1, -1, logits.shape[-1]))
        return torch.where(real, masked_logits, torch.zeros((), dtype=masked_logits.dtype, device=masked_logits.device))


class FillMask(Task):
    """Hugging Face `fill-mask`. The masked tokens of a text are the same each time it is read.

    A masked token is always replaced by the mask token: training does not need the random and unchanged tokens of
    BERT's
    recipe (Wettig et al. 2023, section 5).
    """

    name = "fill-mask"
    columns = (Column("text"),)
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN, PREDICTS_TOKENS})
    architectures = ("ForMaskedLM", "WithLMHeadModel")
    app_steps = ("tokenize", "unmask")
    starter = starter_recipe(
        "my-masked-language-model",
        "a smaller, faster masked language model, taught on my own texts",
        "distilbert/distilbert-base-uncased",
        split_files("csv", {"text": "text"}),
        {"finetune": {"epochs": 1}, **distill_finetuned(epochs=2), "onnx": {}, "onnx_int8": {}},
        relative_limit("top_1_accuracy", 0.95),
        baseline="finetune",
    )
    slices = (Slice(length="quartiles"),)
    ratios = ("top_1_accuracy", "top_5_accuracy", "loss")
    metrics = ("top_1_accuracy", "top_5_accuracy", "loss", "agreement")
    batch_size = 8

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer.

        Raises `ModelError` if they do not load, or if the tokenizer has no mask token.
        """
        model = load_encoder(self.name, directory, "MaskedLM", None, trust_remote_code)
        _mask_id(model.processor)
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize and mask; ``labels`` [n, positions] hold the masked tokens, else -100.

        Raises `DataError` for a text that already contains a mask token.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        mask, texts = _mask_id(processor), rows["text"].to_pylist()
        encoded = processor(texts, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        inputs, padding = text_inputs(encoded, processor)
        label_rows = []
        for index, (text, special) in enumerate(zip(texts, encoded["special_tokens_mask"], strict=True)):
            ids = inputs[index]["input_ids"]
            if (ids == mask).any():
                raise DataError(
                    f"The text {text[:60]!r} has {processor.mask_token} in it.",
                    where=f"row {index + 1}",
                    expected="whole texts, whose tokens are masked here",
                )
            places = np.flatnonzero(np.asarray(special) == 0)
            count = min(max(1, round(_SHARE * len(places))), len(places))
            chosen = np.random.default_rng(zlib.crc32(text.encode())).permutation(places)[:count]
            row = np.full(len(ids), IGNORED)
            row[chosen] = ids[chosen]
            ids[chosen] = mask
            label_rows.append(row.tolist())
        note = f"{sum(1 for row in label_rows for token in row if token != IGNORED):,} tokens are masked"
        return Examples(inputs, padding, ragged(label_rows, IGNORED), note=note, head=MaskedLogits(mask))

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the masked tokens."""
        logits = outputs.logits
        targets = labels[:, : logits.shape[1]]
        real = targets != IGNORED
        return cross_entropy(logits[:, : targets.shape[1]][real].float(), targets[real].long())

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL divergence averaged over masked tokens."""
        return token_distance(mine, taught, temperature)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return loss in nats, rank and most likely token of each masked token, [batch, most], padded with NaN and -1.

        Raises `ModelError` if logits are not finite.
        """
        assert examples.labels is not None, "encode masks every text"
        answers = finite(examples.answers(outputs, examples.batch(indices)))
        most = int((examples.labels != IGNORED).sum(axis=1).max(initial=0))
        loss = np.full((len(indices), most), np.nan)
        rank, first = (np.full((len(indices), most), _NONE) for _ in range(2))
        for row, index in enumerate(indices):
            targets = examples.labels[index]
            targets = targets[targets != IGNORED]
            logits = answers[row, : len(targets)]
            target_logits = np.take_along_axis(logits, targets[:, None].astype(np.int64), 1)
            loss[row, : len(targets)] = -np.take_along_axis(
                token_metrics.log_probabilities(logits), targets[:, None], 1
            )[:, 0]
            rank[row, : len(targets)] = 1 + (logits > target_logits).sum(axis=1)
            first[row, : len(targets)] = logits.argmax(axis=1)
        return {_LOSS: loss, _RANK: rank, _FIRST: first}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return top-1 and top-5 accuracy and the loss in nats of all masked tokens, with intervals over texts.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        rank, real = collected[_RANK], collected[_RANK] != _NONE
        tokens = real.sum(axis=1)
        loss = ratio_row(_LOSS, np.nansum(collected[_LOSS], axis=1), tokens, model, target, unit="nats")
        return [
            ratio_row("top_1_accuracy", ((rank <= 1) & real).sum(axis=1), tokens, model, target),
            ratio_row("top_5_accuracy", ((rank <= 5) & real).sum(axis=1), tokens, model, target),
            loss,
        ]

    def raw_examples(
        self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int
    ) -> Examples:
        """Tokenize texts that contain mask tokens. Raises `DataError` for a text without one.

        Args:
            rows: Rows with the `raw_columns`.
            processor: Processor of the model.
            labels: Has no effect, since there are no classes.
            max_length: Number of tokens after which texts are truncated.
        """
        mask, texts = _mask_id(processor), rows["text"].to_pylist()
        inputs, padding = text_inputs(processor(texts, truncation=True, max_length=max_length), processor)
        for index, example in enumerate(inputs):
            if mask not in example["input_ids"]:
                raise DataError(
                    f"{texts[index][:60]!r} has no {processor.mask_token} among its first {max_length} tokens.",
                    where=f"row {index + 1}",
                    expected=f"{processor.mask_token} in place of a word",
                )
        return Examples(inputs, padding, head=MaskedLogits(mask))

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the likeliest tokens in place of the mask, each with `token_str` and `score`.

        A text with several masks has a list for each of them.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        predictions = []
        for logits, example in zip(answers, examples.inputs, strict=True):
            count = int((example["input_ids"] == processor.mask_token_id).sum())
            places = []
            for probabilities in calibration.softmax(finite(logits[:count])):
                first = np.argsort(-probabilities, kind="stable")[:_MOST_LIKELY]
                places.append(
                    [{"token_str": processor.decode([i]).strip(), "score": float(probabilities[i])} for i in first]
                )
            predictions.append(places[0] if count == 1 else places)
        return predictions

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of masked tokens for which both models have the same most likely token.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        real = collected[_RANK] != _NONE
        return [agreement_row(collected[_FIRST][real] == reference[_FIRST][real], model, target)]


def _mask_id(processor: Processor) -> int:
    mask_id: int | None = processor.mask_token_id
    if mask_id is None:
        raise ModelError("The tokenizer has no mask.", expected="a mask_token in tokenizer_config.json")
    return mask_id


TASK = FillMask()
