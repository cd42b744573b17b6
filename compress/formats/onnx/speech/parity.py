"""Proof that Whisper's graphs compute what the torch model with the same weights computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import torch

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import IntegrityError
from compress.formats.onnx.model import OnnxModel
from compress.formats.prove import distance

_PROMPT = 2
"""Tokens that are read at once, as a transcript's prompt is, before the others come one by one."""


def prove_whisper(
    model: OnnxModel,
    checkpoint: Checkpoint,
    features: Sequence[np.ndarray],
    texts: Sequence[np.ndarray],
    tolerance: float,
) -> float:
    """The largest difference of a logit from torch, over recordings [features, frames] and their texts of token ids.

    Each text is read in one go, and again as it is spoken: its beginning, then token by token. Raises
    `IntegrityError` above ``tolerance``.
    """
    from transformers import WhisperForConditionalGeneration

    module = WhisperForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    encoder, decoder = (_Graph(graph) for graph in model.graphs.values())

    def answers() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for window, tokens in zip(features, texts, strict=True):
            batch = window[np.newaxis]
            with torch.inference_mode():
                answer = module(torch.from_numpy(batch), decoder_input_ids=torch.from_numpy(tokens[np.newaxis]))
            hidden = encoder.run({"input_features": batch})["last_hidden_state"]
            spoken = [tokens[:_PROMPT], *np.split(tokens[_PROMPT:], max(1, len(tokens) - _PROMPT))]
            for parts in ([tokens], [part for part in spoken if len(part)]):
                yield answer.logits.numpy(), _read(decoder, hidden, parts)

    worst = distance(answers()).worst
    if not worst <= tolerance:
        raise IntegrityError(
            f"The graphs' logits differ from torch by {worst:.2e}.",
            expected=f"at most {tolerance:g}",
            mend="raise tolerance if the difference is acceptable; else please report it with the model's config",
        )
    return worst


def teacher_forced(model: OnnxModel, features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of a text that is read at once, of one recording [features, frames]."""
    encoder, decoder = (_Graph(graph) for graph in model.graphs.values())
    hidden = encoder.run({"input_features": features[np.newaxis]})["last_hidden_state"]
    logits: np.ndarray = _read(decoder, hidden, [tokens])[0]
    return logits


class _Graph:
    def __init__(self, graph: onnx.ModelProto) -> None:
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feed)), strict=True))


def _read(decoder: _Graph, hidden: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Logits [1, tokens, vocabulary] of a text that comes in parts."""
    names = [name for name in decoder.inputs if name.startswith("past_key_values.")]
    past = {name: np.zeros((1, decoder.inputs[name][1], 0, decoder.inputs[name][3]), np.float32) for name in names}
    logits = []
    for index, part in enumerate(parts):
        feed = {
            "input_ids": part[np.newaxis],
            "encoder_hidden_states": hidden,
            "use_cache_branch": np.array([index > 0]),
        }
        found = decoder.run({**feed, **past})
        logits.append(found["logits"])
        kept = [name for name in names if index == 0 or ".decoder." in name]
        past |= {name: found["present." + name.removeprefix("past_key_values.")] for name in kept}
    return np.concatenate(logits, axis=1)
