"""Calls that are profiled: batches of examples, or a decoder's prompts, or the tokens after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from compress.benchmark.profile import Phase
from compress.benchmark.rounds import batches_by_length, evenly_spaced, sample_by_length
from compress.formats.generation.decoder import PAST, PRESENT
from compress.formats.onnx.costs import Tensor
from compress.formats.runtime import Batch
from compress.tasks.task import Examples
from compress.utils.errors import DataError

MAX_CALLS = 16
"""Largest number of different calls that are profiled."""
TextPhase = Literal["prompt", "token"]


@dataclass(frozen=True)
class ProfiledCalls:
    """Calls of a profile, one for each of ``batches``.

    Those of a decoder hold ``input_ids`` [1, n]. With a ``prompt``, which is read before them, each call adds a token
    to the text. Without one, each call begins a new text. ``context`` is the length of a prompt in both cases.
    """

    batches: tuple[Batch, ...]
    batch_size: int = 1
    phase: Phase = "batch"
    context: int | None = None
    prompt: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.batches)

    def length(self, call: int) -> int:
        """Return the tokens of a call: its padded length, or all tokens of its text so far."""
        batch_length = max((array.shape[1] for array in self.batches[call].values() if array.ndim > 1), default=1)
        return len(self.prompt) + call + 1 if self.prompt else batch_length

    def shapes(self, graph: ir.Graph, call: int) -> dict[str, Tensor]:
        """Return the inputs of a call by name, and for a decoder its keys and values after the call.

        Their buffers are larger; the shapes are those of their contents.
        """
        if self.phase == "batch":
            inputs = self.batches[call].items()
            return {name: Tensor(ir.DataType.from_numpy(array.dtype), array.shape) for name, array in inputs}
        total = self.length(call)
        cached = any(str(value.name).startswith(PAST) for value in graph.inputs)
        past_length = total - 1 if self.prompt and cached else 0
        shapes = {}
        for value in (*graph.inputs, *graph.outputs):
            name = str(value.name)
            if name.startswith((PAST, PRESENT)):
                # The shape [1, heads, length, head size] of keys or values.
                length = past_length if name.startswith(PAST) else total
                assert value.shape is not None
                heads, size = value.shape[1], value.shape[3]
                assert isinstance(heads, int) and isinstance(size, int)
                shapes[name] = Tensor(_type(value), (1, heads, length, size))
            elif value.is_graph_input():
                shapes[name] = Tensor(_type(value), (1, total if name == "attention_mask" else total - past_length))
        return shapes


def batch_calls(examples: Examples, batch_size: int, seed: int) -> ProfiledCalls:
    """Return batches of examples of similar length, spread over the lengths of the data.

    Raises:
        DataError: There are no examples.
    """
    if len(examples) == 0:
        raise DataError("There is no example to profile with.", expected="at least one row in the test split")
    sampled = sample_by_length(examples.lengths(), max(batch_size, len(examples)), seed)
    groups = batches_by_length(len(sampled), batch_size)
    chosen = evenly_spaced(list(range(len(groups))), MAX_CALLS)
    return ProfiledCalls(tuple(examples.batch([sampled[i] for i in groups[index]]) for index in chosen), batch_size)


def text_calls(ids: Sequence[int], phase: TextPhase, context: int) -> ProfiledCalls:
    """Return prompts of ``context`` tokens of a text, or the tokens after its first prompt.

    Raises:
        DataError: The text is too short.
    """
    required = context + (phase == "token")
    if len(ids) < required:
        raise DataError(
            f"The evaluation text has {len(ids)} tokens; a prompt of {context} needs {required}.",
            where="--context",
            hint="give a smaller one, or more text",
        )
    if phase == "token":
        tokens = ids[context : context + MAX_CALLS]
        return ProfiledCalls(tuple(_batch([token]) for token in tokens), 1, phase, context, tuple(ids[:context]))
    starts = range(0, len(ids) - context + 1, context)[:MAX_CALLS]
    return ProfiledCalls(tuple(_batch(ids[start : start + context]) for start in starts), 1, phase, context)


def _batch(ids: Sequence[int]) -> Batch:
    return {"input_ids": np.array([ids], np.int64)}


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
