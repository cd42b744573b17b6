"""Text from text by transformers' own `generate`, with the settings of the folder's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.cross_attention_decoder import IDS
from compress.formats.generation.image_text import ImageAnswers, read_rules, until_ended
from compress.formats.generation.seq2seq import MASK, SEQUENCES, TEXTS
from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.formats.safetensors.session import FAILURES, TorchSession, as_array, as_tensor
from compress.utils.errors import StageError, first_line


class GeneratedText:
    """Session that writes text with the module of ``whole``, like `seq2seq.TextWriter` with two graphs."""

    inputs = (IDS, MASK)
    input_types: Mapping[str, TensorType] = dict.fromkeys(inputs, TensorType("int64", (None, None)))
    output_types: Mapping[str, TensorType] = {
        SEQUENCES: TensorType("int64", (None, None)),
        TEXTS: TensorType("str", (None,)),
    }

    def __init__(self, whole: TorchSession, tokenizer: Any) -> None:
        self._whole, self._tokenizer = whole, tokenizer
        self.provider, self.settings = whole.provider, whole.settings

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return `texts` [n] and `sequences` [n, longest]; raise `StageError` if transformers fails."""
        check_inputs(self.inputs, batch, self._whole.where)
        sequences = _generated(self._whole, {name: batch[name] for name in self.inputs})
        texts = self._tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return {SEQUENCES: as_array(sequences[:, 1:]), TEXTS: np.array(texts)}


def answers_to_images(whole: TorchSession, processor: Any, folder: Path) -> ImageAnswers:
    """Return a session that answers images with the module of ``whole``; raise `ModelError` if it cannot.

    Sampling in the generation config is turned off, so that answers are the same every time.
    """
    rules = read_rules(folder)

    def write(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        prompt = batch[IDS].shape[1]
        found = _generated(whole, batch, max_new_tokens=rules.room(prompt), do_sample=False)
        return until_ended(as_array(found[:, prompt:]), rules.ends)

    return ImageAnswers(write, folder, processor.tokenizer, whole)


def _generated(whole: TorchSession, batch: Batch, **options: Any) -> Any:
    import torch

    try:
        with torch.inference_mode():
            return whole.module.generate(**{name: as_tensor(np.asarray(batch[name])) for name in batch}, **options)
    except FAILURES as error:
        raise StageError(f"The model failed on a batch: {first_line(error)}", where=whole.where) from error
