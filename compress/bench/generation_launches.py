"""Timing of text generation: fresh processes launch after launch, the models in turns on the same lengths of text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from compress.bench.child import Child
from compress.bench.launches import LostError, Reference, losing, own_seconds
from compress.bench.noise import Snapshot, frequency_mhz
from compress.bench.record import Conditions, Record, usual_reference
from compress.bench.reference import SINGLE_THREADED
from compress.bench.rounds import Generation, Rounds, Run, Turn, in_turn, take_turns, warm_up
from compress.numerics.statistics import geometric_interval
from compress.targets import Target

_UNTIMED = 2
_WARM_UP_TOKENS = 4
_CAUTION = 1.2
"""A launch's least work may take so much longer than the longest before."""
_SHARE_OF_STARTS = 0.4
"""The part of a time budget that starts and warm-ups may have, as long as there are enough launches."""


@dataclass(frozen=True)
class GenerationWork:
    """What every process is given: prompts of each of ``contexts`` tokens, rising, and ``tokens`` to follow the first.

    ``texts`` holds token ids of each model, at least as many as the longest context; where it is empty, ids are drawn
    from the middle half of the model's own vocabulary. ``no_batches`` is a file without any. ``elsewhere`` are the
    targets of models that don't run on the session's.
    """

    artifacts: Mapping[str, Path]
    contexts: tuple[int, ...]
    tokens: int
    texts: Mapping[str, Sequence[int]]
    no_batches: Path
    elsewhere: Mapping[str, Target] = field(default_factory=dict)

    def prompt(self, model: str, context: int, vocabulary: int, seed: int) -> list[int]:
        """The first ``context`` ids of the model's text."""
        if self.texts:
            return list(self.texts[model][:context])
        return draw_tokens(max(self.contexts), vocabulary, seed)[:context]


@dataclass
class GenerationRecord:
    """Everything that the launches brought in.

    For each context ``first`` holds a call a round, the prompt, and ``steps`` a call a token, numbered by its place.
    """

    session: Record = field(default_factory=Record)
    first: dict[int, Rounds] = field(default_factory=dict)
    steps: dict[int, Rounds] = field(default_factory=dict)
    cached: dict[str, bool] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)

    def timings(self) -> list[Rounds]:
        """Prompts and steps of all contexts."""
        return [*self.first.values(), *self.steps.values()]

    def add(self, context: int, launch: int, found: Mapping[str, Generation], pulse_ms: float) -> None:
        """Keep one round of all models."""
        for rounds, turns in (
            (self.first[context], {name: Turn([one.first_ms], one.disturbed[:1]) for name, one in found.items()}),
            (self.steps[context], {name: Turn(one.steps_ms, one.disturbed[1:]) for name, one in found.items()}),
        ):
            rounds.add(range(len(next(iter(turns.values())).latencies_ms)), launch, turns, pulse_ms)

    def rounds(self) -> dict[str, Rounds]:
        """Of each context; every round has a prompt and its steps."""
        return {f"context_{context}": rounds for context, rounds in self.first.items()}

    def undisturbed(self) -> GenerationRecord:
        """Without the rounds in which the machine was slowed from outside; see `Rounds.undisturbed`."""
        first = {context: rounds.undisturbed() for context, rounds in self.first.items()}
        session = self.session
        if any(first[context] is not rounds for context, rounds in self.first.items()):
            session = replace(session, reference=usual_reference(session.reference))
        steps = {context: rounds.undisturbed() for context, rounds in self.steps.items()}
        return replace(self, session=session, first=first, steps=steps)

    def forget(self, model: str) -> None:
        """Drop what was measured of a model that was lost."""
        self.session.forget(model)
        for rounds in self.timings():
            rounds.turns.pop(model, None)


def draw_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """``count`` ids of the middle half of the vocabulary: special tokens lie at its ends, rare ones at its end."""
    low = vocabulary // 4
    drawn = np.random.default_rng(seed).integers(low, max(low + 1, 3 * vocabulary // 4), count)
    return [int(token) for token in drawn]


class GenerationLaunches:
    """One session, as `Launches` is one: launches are made until ratios are precise enough, or time is up."""

    def __init__(self, work: GenerationWork, conditions: Conditions, baseline: str) -> None:
        self._work, self._conditions, self._baseline = work, conditions, baseline
        self._names = list(work.artifacts)
        self._longest = 0.0
        self.record = GenerationRecord(
            first={context: Rounds() for context in work.contexts},
            steps={context: Rounds() for context in work.contexts},
        )

    def __iter__(self) -> Iterator[int]:
        """Make the launches, yielding the number of each that is done.

        A model whose process dies or hangs is left out from then on, with the reason in ``record.session.lost``.
        Raises `StageError` if that is the baseline, and what opening a model raises.
        """
        conditions, session = self._conditions, self.record.session
        with Child("machine", variables=SINGLE_THREADED) as machine:
            reference = Reference(machine, conditions, session.reference)
            while not self._is_enough():
                try:
                    self._launch(session.launches, machine, reference)
                except LostError as lost:
                    if lost.model == self._baseline:
                        raise lost.error from None
                    session.lost[lost.model] = str(lost.error)
                    self.record.forget(lost.model)
                    self._names.remove(lost.model)
                session.launches += 1
                yield session.launches

    def precision(self) -> float:
        """Half the width of the widest interval, as a share: of ratios to the baseline, or of the baseline alone."""
        if not self._has_rounds() or len(set(self._timings_launches())) < 2:
            return float("inf")
        others = [name for name in self._names if name != self._baseline]
        confidence = self._conditions.confidence
        samples = [
            ratios
            for rounds in self.record.undisturbed().timings()
            for ratios in (
                [rounds.ratios(self._baseline, name) for name in others] or [rounds.relative_launches(self._baseline)]
            )
        ]
        intervals = [geometric_interval(ratios, confidence) for ratios in samples]
        return max(found.high / found.value - 1 for found in intervals)

    def _has_rounds(self) -> bool:
        return all(rounds.calls for rounds in self.record.timings())

    def _timings_launches(self) -> list[int]:
        # The last context's rounds are the fewest, where a launch was cut short.
        return min((rounds.launches for rounds in self.record.timings()), key=len)

    def _is_enough(self) -> bool:
        done, deadline = self.record.session.launches, self._conditions.deadline
        if deadline is not None and self._has_rounds() and time.perf_counter() + _CAUTION * self._longest > deadline:
            return True
        if done < self._conditions.launches:
            return False
        if deadline is None and done >= self._conditions.most_launches:
            return True
        return self.precision() <= self._conditions.precision

    def _until(self, began: float) -> float:
        """When this launch shall end, its least work being done."""
        conditions, now = self._conditions, time.perf_counter()
        self._longest = max(self._longest, now - began)
        if conditions.deadline is None:
            share = conditions.seconds * len(self._names) * len(self._work.contexts) / conditions.most_launches
            return now + share
        left = conditions.deadline - began
        done = self.record.session.launches
        fitting = done + int(left * _SHARE_OF_STARTS / self._longest)
        planned = min(max(conditions.launches, fitting), conditions.most_launches) - done
        return began + left / max(1, planned)

    def _launch(self, number: int, machine: Child, reference: Reference) -> None:
        session, limit = self.record.session, self._conditions.timeout_seconds
        began = time.perf_counter()
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            for name in in_turn(self._names, number):
                children[name] = stack.enter_context(Child(name))
                with losing(name):
                    self._start(children[name])
            for name, child in children.items():
                with losing(name):
                    child.load(self._work.no_batches, limit)
            for child in children.values():
                self._warm_up(child, number)
            before = Snapshot.take(own_seconds(children, machine))
            self._rounds(children, number, began, reference)
            for name, child in children.items():
                with losing(name):
                    session.single_bytes.setdefault(name, []).append(float(child.memory()["peak_bytes"]))
            reference.now()
            session.usage += Snapshot.take(own_seconds(children, machine)).since(before)
            frequency = frequency_mhz()
            session.frequencies_mhz += [] if frequency is None else [frequency]

    def _rounds(self, children: Mapping[str, Child], number: int, began: float, reference: Reference) -> None:
        """Rounds of all contexts, one at least, until the launch's share of the time is over."""
        start = time.perf_counter()
        self._round(children, number, 0, reference)
        took = time.perf_counter() - start
        last = self._until(began) - took / 2
        if self._conditions.deadline is not None:
            last = min(last, self._conditions.deadline - took)
        count = 1
        while time.perf_counter() < last:
            self._round(children, number, count, reference)
            count += 1

    def _round(self, children: Mapping[str, Child], number: int, count: int, reference: Reference) -> None:
        # Names as they were given, not as the processes were started; each order comes equally often.
        order = in_turn(self._names, number + count)
        for context in self._work.contexts:
            turns = {name: partial(self._generate, children[name], context, self._work.tokens) for name in order}
            found, slowest_ms = take_turns(turns, reference.pulse)
            self.record.add(context, number, found, slowest_ms)
            reference.now_and_then()

    def _generate(self, child: Child, context: int, tokens: int) -> Generation:
        vocabulary = self.record.vocabulary[child.label]
        ids = self._work.prompt(child.label, context, vocabulary, self._conditions.seed)
        with losing(child.label):
            return child.generate(ids, tokens, self._conditions.timeout_seconds, _UNTIMED)

    def _start(self, child: Child) -> None:
        """From the start of the process to its first token, of a prompt of one token."""
        session, conditions, name = self.record.session, self._conditions, child.label
        limit = conditions.timeout_seconds
        opened = child.open(
            self._work.artifacts[name],
            self._work.elsewhere.get(name, conditions.target),
            conditions.threads,
            conditions.cores,
            self._work.no_batches,
            limit,
        )
        first = child.generate([0], 0, limit)
        session.startup_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - child.began))
        session.session_load_ms.setdefault(name, []).append(opened["session_load_ms"])
        session.runtime_bytes.setdefault(name, []).append(float(opened["before_bytes"]))
        session.settings[name] = opened["settings"]
        self.record.cached[name], self.record.vocabulary[name] = first.cached, first.vocabulary

    def _warm_up(self, child: Child, number: int) -> None:
        """Every length once, then the shortest until it is steady."""
        conditions = self._conditions
        seconds = conditions.seconds
        if conditions.deadline is not None:
            left = conditions.deadline - time.perf_counter()
            seconds = max(0.0, left / max(1, conditions.launches - number) / 3 / len(self._names))
        with losing(child.label):
            shapes = range(1, len(self._work.contexts))
            warmed = warm_up(self._run(child), shapes, [0], seconds)
        self.record.session.warm_ups.setdefault(child.label, []).append(warmed)

    def _run(self, child: Child) -> Run:
        tokens = min(_WARM_UP_TOKENS, self._work.tokens)

        def run(calls: Sequence[int]) -> Turn:
            generated = [self._generate(child, self._work.contexts[call], tokens) for call in calls]
            return Turn([one.first_ms + sum(one.steps_ms) for one in generated])

        return run
