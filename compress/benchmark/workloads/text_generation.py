"""Generated texts: the models in turns on the same lengths of prompt, and the tokens that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from compress.benchmark.record import Conditions, Record
from compress.benchmark.restarts import UNTIMED, Reference, keep_memory, losing, repeat_rounds
from compress.benchmark.rounds import Generation, Turn, WarmUp, in_turn, take_turns, warm_up
from compress.benchmark.subprocess_client import Child
from compress.formats.target_profile import Target

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class TextPlan:
    """A `launches.Plan`: prompts of each of ``contexts`` tokens, rising, and ``tokens`` to follow the first.

    ``texts`` holds token ids of each model, at least as many as the longest context; where it is empty, ids are drawn
    from the middle half of the model's own vocabulary. ``elsewhere`` are the targets of models that don't run on the
    session's.
    """

    contexts: Sequence[int]
    tokens: int
    texts: Mapping[str, Sequence[int]]
    elsewhere: Mapping[str, Target] = field(default_factory=dict)

    @property
    def timings(self) -> tuple[str, ...]:
        """See `Plan`: prompts, a call a round, and steps, a call a token, numbered by its place."""
        return tuple(name(context) for context in self.contexts for name in (prompts, steps))

    @property
    def decisive(self) -> tuple[str, ...]:
        """See `Plan`: all."""
        return self.timings

    @property
    def counted(self) -> Mapping[str, str | None]:
        """See `Plan`: a round has a prompt and its steps."""
        return {prompts(context): f" of context {context}" for context in self.contexts}

    def target(self, model: str, usual: Target) -> Target:
        """See `Plan`."""
        return self.elsewhere.get(model, usual)

    def timing(self, conditions: Conditions, record: Record) -> _TextTiming:
        """See `Plan`."""
        return _TextTiming(self, conditions, record)

    def prompt(self, model: str, context: int, vocabulary: int, seed: int) -> list[int]:
        """The first ``context`` ids of the model's text."""
        if self.texts:
            return list(self.texts[model][:context])
        return draw_tokens(max(self.contexts), vocabulary, seed)[:context]


def prompts(context: int) -> str:
    """What a record calls the timings of prompts."""
    return f"context_{context}"


def steps(context: int) -> str:
    """What it calls those of the tokens that follow."""
    return f"steps_{context}"


def add_round(record: Record, context: int, launch: int, found: Mapping[str, Generation], pulse_ms: float) -> None:
    """Keep one round of all models."""
    for name, turns in (
        (prompts(context), {model: Turn([one.first_ms], one.disturbed[:1]) for model, one in found.items()}),
        (steps(context), {model: Turn(one.steps_ms, one.disturbed[1:]) for model, one in found.items()}),
    ):
        record.timings[name].add(range(len(next(iter(turns.values())).latencies_ms)), launch, turns, pulse_ms)


def draw_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """``count`` ids of the middle half of the vocabulary: special tokens lie at its ends, rare ones at its end."""
    low = vocabulary // 4
    drawn = np.random.default_rng(seed).integers(low, max(low + 1, 3 * vocabulary // 4), count)
    return [int(token) for token in drawn]


class _TextTiming:
    """A `launches.Timing`."""

    def __init__(self, plan: TextPlan, conditions: Conditions, record: Record) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record

    def answer_first(self, child: Child, opened: dict[str, Any]) -> None:
        """See `Timing`: a prompt of two tokens."""
        first = child.generate([0], 0, self._conditions.timeout_seconds)
        self._record.cached[child.label], self._record.vocabulary[child.label] = first.cached, first.vocabulary

    def warm_up(self, child: Child, seconds: float) -> WarmUp:
        """See `Timing`: every length once, then the shortest until it is steady."""
        tokens = min(_WARM_UP_TOKENS, self._plan.tokens)

        def run(calls: Sequence[int]) -> Turn:
            generated = [self._generate(child, self._plan.contexts[call], tokens) for call in calls]
            return Turn([one.first_ms + sum(one.steps_ms) for one in generated])

        return warm_up(run, range(1, len(self._plan.contexts)), [0], seconds)

    def sample(
        self, children: Mapping[str, Child], number: int, left: Callable[[int], float], reference: Reference
    ) -> None:
        """See `Timing`: rounds of all contexts until the launch's share of the time is over."""
        run = partial(self._round, children, number, reference)
        repeat_rounds(run, partial(left, len(self._plan.contexts)), self._conditions.deadline)
        keep_memory(children, self._record.single_bytes)

    def _round(self, children: Mapping[str, Child], number: int, reference: Reference, count: int) -> None:
        # Each order comes equally often.
        order = in_turn(list(children), number + count)
        for context in self._plan.contexts:
            turns = {name: partial(self._generate, children[name], context, self._plan.tokens) for name in order}
            found, slowest_ms = take_turns(turns, reference.pulse)
            add_round(self._record, context, number, found, slowest_ms)
            reference.now_and_then()

    def _generate(self, child: Child, context: int, tokens: int) -> Generation:
        vocabulary = self._record.vocabulary[child.label]
        ids = self._plan.prompt(child.label, context, vocabulary, self._conditions.seed)
        with losing(child.label):
            return child.generate(ids, tokens, self._conditions.timeout_seconds, UNTIMED)
