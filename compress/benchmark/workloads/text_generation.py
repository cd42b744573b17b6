"""Text generation workload: interleaved prompts of all models at the same lengths, and the tokens that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import UNTIMED_CALLS, GenerationTimer, naming_lost_model
from compress.benchmark.rounds import GenerationTimes, RoundTimes, WarmUp, warm_up
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

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> _TextTimer:
        """See `WorkloadPlan`."""
        return _TextTimer(self, conditions, record)

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
    prompts = {model: RoundTimes([text.first_ms], text.disturbed[:1]) for model, text in texts.items()}
    steps = {model: RoundTimes(text.steps_ms, text.disturbed[1:]) for model, text in texts.items()}
    for name, times in ((prompt_timing(context), prompts), (token_timing(context), steps)):
        record.timings[name].add(range(len(next(iter(times.values())).latencies_ms)), launch, times, product_ms)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Return ``count`` random ids of the middle half of the vocabulary, without special and rare tokens at its ends."""
    low = vocabulary // 4
    ids = np.random.default_rng(seed).integers(low, max(low + 1, 3 * vocabulary // 4), count)
    return [int(token) for token in ids]


class _TextTimer(GenerationTimer[int, GenerationTimes]):
    """`WorkloadTimer` of texts, whose settings are the lengths of context."""

    def __init__(self, plan: TextGenerationPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        super().__init__(plan.contexts, conditions, record)
        self._plan = plan

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`: a prompt of one token."""
        first = child.generate([0], 0, self.conditions.timeout_seconds)
        self.record.cached[child.label], self.record.vocabulary[child.label] = first.cached, first.vocabulary

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`: every length once, then the shortest until its times are steady."""
        tokens = min(_WARM_UP_TOKENS, self._plan.tokens)

        def run(calls: Sequence[int]) -> RoundTimes:
            generated = [self._generate(child, self.settings[call], tokens) for call in calls]
            return RoundTimes([text.first_ms + sum(text.steps_ms) for text in generated])

        return warm_up(run, range(1, len(self.settings)), [0], seconds)

    def generate(self, child: WorkerProcess, setting: int, number: int) -> GenerationTimes:
        """See `GenerationTimer`."""
        return self._generate(child, setting, self._plan.tokens)

    def add_round(self, setting: int, launch: int, generated: Mapping[str, GenerationTimes], product_ms: float) -> None:
        """See `GenerationTimer`."""
        add_text_round(self.record, setting, launch, generated, product_ms)

    def _generate(self, child: WorkerProcess, context: int, tokens: int) -> GenerationTimes:
        ids = self._plan.prompt(child.label, context, self.record.vocabulary[child.label], self.conditions.seed)
        with naming_lost_model(child.label):
            return child.generate(ids, tokens, self.conditions.timeout_seconds, UNTIMED_CALLS)
