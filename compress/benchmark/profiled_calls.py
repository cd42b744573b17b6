"""What is called to profile an artifact: batches of examples, or a decoder's prompts, or the tokens after one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from compress.benchmark.profile import Phase
from compress.benchmark.scenarios import batches_by_length, evenly_spaced, sample_by_length
from compress.formats.onnx.costs import Tensor
from compress.runtimes.decoder import PAST, PRESENT
from compress.runtimes.runtime import Batch
from compress.tasks.task import Examples
from compress.utils.errors import DataError

MAX_CALLS = 16
"""How many different calls are profiled at most."""
TextPhase = Literal["prompt", "token"]


@dataclass(frozen=True)
class ProfiledCalls:
    """One of ``batches`` a call.

    A decoder's hold ``input_ids`` [1, n]: with a ``prompt``, read before them, each call adds a token to the text;
    without, each begins a text anew. ``context`` is the length of a prompt either way.
    """

    batches: tuple[Batch, ...]
    batch_size: int = 1
    phase: Phase = "batch"
    context: int | None = None
    prompt: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.batches)

    def length(self, call: int) -> int:
        """Tokens of a call: padded, or all that of its text is read once it is done."""
        own = max((array.shape[1] for array in self.batches[call].values() if array.ndim > 1), default=1)
        return len(self.prompt) + call + 1 if self.prompt else own

    def shapes(self, graph: ir.Graph, call: int) -> dict[str, Tensor]:
        """What a call feeds, by name; of a decoder also its keys and values as they are afterwards.

        The buffers that these lie in have more room; what counts is what they hold.
        """
        if self.phase == "batch":
            fed = self.batches[call].items()
            return {name: Tensor(ir.DataType.from_numpy(array.dtype), array.shape) for name, array in fed}
        total = self.length(call)
        cached = any(str(value.name).startswith(PAST) for value in graph.inputs)
        seen = total - 1 if self.prompt and cached else 0
        found = {}
        for value in (*graph.inputs, *graph.outputs):
            name = str(value.name)
            if name.startswith((PAST, PRESENT)):
                found[name] = _cache(value, seen if name.startswith(PAST) else total)
            elif value.is_graph_input():
                found[name] = Tensor(_type(value), (1, total if name == "attention_mask" else total - seen))
        return found


def batch_calls(examples: Examples, batch_size: int, seed: int) -> ProfiledCalls:
    """Batches of neighbours in length, spread over the lengths of the data. Raises `DataError` without examples."""
    if len(examples) == 0:
        raise DataError("There is no example to profile with.", expected="at least one row in the test split")
    drawn = sample_by_length(examples.lengths(), max(batch_size, len(examples)), seed)
    groups = batches_by_length(len(drawn), batch_size)
    chosen = evenly_spaced(list(range(len(groups))), MAX_CALLS)
    return ProfiledCalls(tuple(examples.batch([drawn[i] for i in groups[index]]) for index in chosen), batch_size)


def text_calls(ids: Sequence[int], phase: TextPhase, context: int) -> ProfiledCalls:
    """Prompts of ``context`` tokens of the text ``ids``, or the tokens after the first of them.

    Raises `DataError` for a text that is too short for one.
    """
    needed = context + (phase == "token")
    if len(ids) < needed:
        raise DataError(
            f"The text that is judged by has {len(ids)} tokens; a prompt of {context} needs {needed}.",
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


def _cache(value: ir.Value, length: int) -> Tensor:
    """[1, heads, length, size of a head]."""
    assert value.shape is not None
    heads, size = value.shape[1], value.shape[3]
    assert isinstance(heads, int) and isinstance(size, int)
    return Tensor(_type(value), (1, heads, length, size))


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
