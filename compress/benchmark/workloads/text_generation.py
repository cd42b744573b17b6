"""Text generation workload: interleaved prompts of all models at the same lengths, and the tokens that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import (
    UNTIMED_CALLS,
    ReferenceTimer,
    naming_lost_model,
    record_peak_memory,
    repeat_rounds,
)
from compress.benchmark.rounds import GenerationTimes, RoundTimes, WarmUp, round_order, run_round, warm_up
from compress.benchmark.subprocess_client import WorkerProcess
from compress.formats.target_profile import Target

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class TextGenerationPlan:
    """`WorkloadPlan` of prompts with each of ``contexts`` tokens, ascending, and ``tokens`` after the first one.

    ``texts`` holds token ids of each model, at least as many as the longest context. If it is empty, random ids of the
    middle half of the model's vocabulary are used. ``other_targets`` are the targets of models that don't run on the
    session's target.
    """

    contexts: Sequence[int]
    tokens: int
    texts: Mapping[str, Sequence[int]]
    other_targets: Mapping[str, Target] = field(default_factory=dict)

    @property
    def timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`: prompts, one call a round, and tokens, one call a token, numbered by position."""
        return tuple(name(context) for context in self.contexts for name in (prompt_timing, token_timing))

    @property
    def deciding_timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`: all of them."""
        return self.timings

    @property
    def reported(self) -> Mapping[str, str | None]:
        """See `WorkloadPlan`: a round has a prompt and its tokens."""
        return {prompt_timing(context): f" of context {context}" for context in self.contexts}

    def target(self, model: str, usual: Target) -> Target:
        """See `WorkloadPlan`."""
        return self.other_targets.get(model, usual)

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> _TextTiming:
        """See `WorkloadPlan`."""
        return _TextTiming(self, conditions, record)

    def prompt(self, model: str, context: int, vocabulary: int, seed: int) -> list[int]:
        """Return the first ``context`` ids of the model's text, or random ids without one.

        Args:
            model: Name of the model.
            context: Number of tokens.
            vocabulary: Size of the model's vocabulary.
            seed: Seed of random ids.
        """
        if self.texts:
            return list(self.texts[model][:context])
        return random_tokens(max(self.contexts), vocabulary, seed)[:context]


def prompt_timing(context: int) -> str:
    """Return the name of the timings of prompts in a record."""
    return f"context_{context}"


def token_timing(context: int) -> str:
    """Return the name of the timings of the tokens after a prompt in a record."""
    return f"steps_{context}"


def add_text_round(
    record: TimingRecord, context: int, launch: int, texts: Mapping[str, GenerationTimes], product_ms: float
) -> None:
    """Add one round of all models.

    Args:
        record: Record that the round is added to.
        context: Number of tokens of the prompt.
        launch: Number of the set of processes.
        texts: Times of each model's text.
        product_ms: Longest time of the reference product during the round.
    """
    for name, times in (
        (
            prompt_timing(context),
            {model: RoundTimes([text.first_ms], text.disturbed[:1]) for model, text in texts.items()},
        ),
        (
            token_timing(context),
            {model: RoundTimes(text.steps_ms, text.disturbed[1:]) for model, text in texts.items()},
        ),
    ):
        record.timings[name].add(range(len(next(iter(times.values())).latencies_ms)), launch, times, product_ms)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Return ``count`` random ids of the middle half of the vocabulary, without special and rare tokens at its ends."""
    low = vocabulary // 4
    ids = np.random.default_rng(seed).integers(low, max(low + 1, 3 * vocabulary // 4), count)
    return [int(token) for token in ids]


class _TextTiming:
    """`WorkloadTimer` of texts."""

    def __init__(self, plan: TextGenerationPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`: a prompt of one token."""
        first = child.generate([0], 0, self._conditions.timeout_seconds)
        self._record.cached[child.label], self._record.vocabulary[child.label] = first.cached, first.vocabulary

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`: every length once, then the shortest until its times are steady."""
        tokens = min(_WARM_UP_TOKENS, self._plan.tokens)

        def run(calls: Sequence[int]) -> RoundTimes:
            generated = [self._generate(child, self._plan.contexts[call], tokens) for call in calls]
            return RoundTimes([text.first_ms + sum(text.steps_ms) for text in generated])

        return warm_up(run, range(1, len(self._plan.contexts)), [0], seconds)

    def sample(
        self,
        children: Mapping[str, WorkerProcess],
        number: int,
        left: Callable[[int], float],
        reference: ReferenceTimer,
    ) -> None:
        """Time rounds of all contexts until the launch's share of the time is over; see `WorkloadTimer`.

        Args:
            children: Processes by model.
            number: Number of the launch.
            left: Returns the seconds that are left for a number of contexts.
            reference: Timer of the reference work.
        """
        run = partial(self._round, children, number, reference)
        repeat_rounds(run, partial(left, len(self._plan.contexts)), self._conditions.deadline)
        record_peak_memory(children, self._record.single_bytes)

    def _round(self, children: Mapping[str, WorkerProcess], number: int, reference: ReferenceTimer, count: int) -> None:
        # Each order comes equally often.
        order = round_order(list(children), number + count)
        for context in self._plan.contexts:
            runs = {name: partial(self._generate, children[name], context, self._plan.tokens) for name in order}
            texts, product_ms = run_round(runs, reference.time_small_product)
            add_text_round(self._record, context, number, texts, product_ms)
            reference.measure_periodically()

    def _generate(self, child: WorkerProcess, context: int, tokens: int) -> GenerationTimes:
        vocabulary = self._record.vocabulary[child.label]
        ids = self._plan.prompt(child.label, context, vocabulary, self._conditions.seed)
        with naming_lost_model(child.label):
            return child.generate(ids, tokens, self._conditions.timeout_seconds, UNTIMED_CALLS)
