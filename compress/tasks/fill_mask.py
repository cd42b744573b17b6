"""Fill-mask: the tokens that are masked in a text, told from those around them. Importing this imports no torch."""

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
from compress.tasks.task import LOGITS, CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement

_LOSS, _RANK, _FIRST = "loss", "rank", "first"
_SHARE = 0.15
"""Of a text's tokens that are masked (Devlin et al. 2019, section 3.1), one at least."""
_NONE = -1

_STARTER: dict[str, Any] = {
    "name": "my-masked-language-model",
    "description": "a smaller, faster masked language model, taught on my own texts",
    "model": "distilbert/distilbert-base-uncased",
    "data": {
        "splits": {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"},
        "columns": {"text": "text"},
    },
    "stages": [
        {"finetune": {"epochs": 1}},
        {"distill": {"teacher": "finetune", "student": {"layers": [0, 2, 4]}, "epochs": 2}},
        {"onnx": {}},
        {"onnx_int8": {}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "top_1_accuracy", "at_least": 0.95, "of": "baseline"}],
}


@dataclass(frozen=True)
class MaskedLogits:
    """The logits of the masked tokens of each text, in their order, zeros after the last: a `Head`."""

    mask_id: int
    outputs: ClassVar[tuple[str, ...]] = (LOGITS,)
    answer: ClassVar[str] = "masked_logits"
    answer_label: ClassVar[str] = "logits of masked tokens"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, most masked tokens of a text, vocabulary]."""
        import torch

        logits = outputs[LOGITS]
        masked = batch["input_ids"] == self.mask_id
        most = max(int(masked.sum(dim=1).max()), 1)
        order = torch.argsort((~masked).to(torch.uint8), dim=1, stable=True)[:, :most]
        real = torch.gather(masked, 1, order)[..., None]
        found = torch.gather(logits, 1, order[..., None].expand(-1, -1, logits.shape[-1]))
        return torch.where(real, found, torch.zeros((), dtype=found.dtype, device=found.device))


class FillMask(Task):
    """Hugging Face `fill-mask`: of each text some tokens are masked, the same ones whenever it is read.

    What is masked is always replaced by the mask: evaluation asks nothing else, and learning does not need the random
    and the kept tokens of BERT's recipe (Wettig et al. 2023, section 5).
    """

    name = "fill-mask"
    columns = (Column("text"),)
    capabilities = frozenset({READS_ROWS, TAKES_TEXT, HAS_CLASSES, SINGLE_CALL, ANSWERS_PER_TOKEN, PREDICTS_TOKENS})
    architectures = ("ForMaskedLM", "WithLMHeadModel")
    app_steps = ("tokenize", "unmask")
    starter = _STARTER
    slices = (Slice(length="quartiles"),)
    ratios = ("top_1_accuracy", "top_5_accuracy", "loss")
    batch_size = 8

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and tokenizer. Raises `ModelError` for what does not load, or a tokenizer without a mask."""
        from compress.tasks.tokens import load_encoder

        model = load_encoder(self.name, directory, "MaskedLM", None, trust_remote_code)
        _mask_id(model.processor)
        return model

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize and mask; ``labels`` [n, places] are the tokens that stood where a mask is now, else -100.

        Raises `DataError` for a text that has a mask already.
        """
        import numpy as np

        from compress.tasks.tokens import IGNORED, ragged, text_inputs

        mask, texts = _mask_id(processor), rows["text"].to_pylist()
        encoded = processor(texts, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        inputs, padding = text_inputs(encoded, processor)
        wanted = []
        for index, (example, text, special) in enumerate(
            zip(inputs, texts, encoded["special_tokens_mask"], strict=True)
        ):
            ids = example["input_ids"]
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
            wanted.append(row.tolist())
        note = f"{sum(1 for row in wanted for token in row if token != IGNORED):,} tokens are masked"
        return Examples(inputs, padding, ragged(wanted, IGNORED), note=note, head=MaskedLogits(mask))

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the masked tokens."""
        from compress.tasks.classes import cross_entropy
        from compress.tasks.tokens import IGNORED

        logits = outputs.logits
        wanted = labels[:, : logits.shape[1]]
        real = wanted != IGNORED
        return cross_entropy(logits[:, : wanted.shape[1]][real].float(), wanted[real].long())

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Softened KL, averaged over masked tokens."""
        from compress.tasks.tokens import token_distance

        return token_distance(mine, taught, temperature)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Of each masked token its loss in nats, its rank and the likeliest one, [batch, most]; NaN and -1 at the end.

        Raises `ModelError` where logits are not finite.
        """
        import numpy as np

        from compress.numerics.next_token import log_probabilities
        from compress.tasks.tokens import IGNORED

        assert examples.labels is not None, "encode masks every text"
        found = examples.answers(outputs, examples.batch(indices))
        if not np.isfinite(found).all():
            raise ModelError("The model's outputs are not finite.", hint="export or quantize it anew")
        most = int((examples.labels != IGNORED).sum(axis=1).max(initial=0))
        loss = np.full((len(indices), most), np.nan)
        rank, first = (np.full((len(indices), most), _NONE) for _ in range(2))
        for row, index in enumerate(indices):
            wanted = examples.labels[index]
            wanted = wanted[wanted != IGNORED]
            logits = found[row, : len(wanted)]
            own = np.take_along_axis(logits, wanted[:, None].astype(np.int64), 1)
            loss[row, : len(wanted)] = -np.take_along_axis(log_probabilities(logits), wanted[:, None], 1)[:, 0]
            rank[row, : len(wanted)] = 1 + (logits > own).sum(axis=1)
            first[row, : len(wanted)] = logits.argmax(axis=1)
        return {_LOSS: loss, _RANK: rank, _FIRST: first}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Of all masked tokens: how often the right one is the likeliest, or among five, and the loss in nats.

        Intervals are over texts.
        """
        import numpy as np

        from compress.tasks.classes import ratio_row

        rank, real = kept[_RANK], kept[_RANK] != _NONE
        tokens = real.sum(axis=1)
        loss = ratio_row(_LOSS, np.nansum(kept[_LOSS], axis=1), tokens, model, target, unit="nats")
        return [
            ratio_row("top_1_accuracy", ((rank <= 1) & real).sum(axis=1), tokens, model, target),
            ratio_row("top_5_accuracy", ((rank <= 5) & real).sum(axis=1), tokens, model, target),
            loss,
        ]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """For how many masked tokens both have the same likeliest one."""
        from compress.tasks.classes import agreement_row

        real = kept[_RANK] != _NONE
        return [agreement_row(kept[_FIRST][real] == reference[_FIRST][real], model, target)]

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: a text has many masked tokens."""
        return None


def _mask_id(processor: Any) -> int:
    found: int | None = processor.mask_token_id
    if found is None:
        raise ModelError("The tokenizer has no mask.", expected="a mask_token in tokenizer_config.json")
    return found


TASK = FillMask()
