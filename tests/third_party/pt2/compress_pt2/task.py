"""Classification of text pairs, such as whether the second text follows from the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.tasks.task import Examples
from compress.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    import pyarrow as pa


class PairClassification(TextClassification):
    """Rows of `text`, `pair` and `label`; the rest is as in text classification."""

    name = "text-pair-classification"
    columns = (Column("text"), Column("pair"), Column("label", label=True))
    architectures = ()
    app_steps = ()

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Tokenize both texts as one input, with token types. Raises `DataError`."""
        import numpy as np

        from compress.tasks.classes import label_ids

        texts, pairs = rows["text"].to_pylist(), rows["pair"].to_pylist()
        encoded = processor(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = [
            {name: np.array(row, dtype=np.int64) for name, row in zip(names, three, strict=True)}
            for three in zip(*(encoded[name] for name in names), strict=True)
        ]
        padding = {"input_ids": processor.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
        known = labels is not None and "label" in rows.column_names
        return Examples(inputs, padding, label_ids(rows["label"].to_pylist(), labels) if known else None)


TASK = PairClassification()
