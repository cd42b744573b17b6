"""Comparison of two models on recorded traffic: answers, latency and cost, with intervals that hold at any time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from compress.benchmark.subprocess_client import WorkerProcess
from compress.benchmark.worker import write_batches
from compress.data.columns import are_label_ids
from compress.evaluation.evaluate import artifact_labels, predict
from compress.numerics.differences import Verdict, decide
from compress.numerics.statistics import IntervalEstimate
from compress.plugins.monitoring.hypothesis_tests import mean_sequence, median_sequence
from compress.plugins.monitoring.outputs import ServedModel, encode, gives_classes
from compress.plugins.monitoring.traffic import Traffic
from compress.tasks.capability import SINGLE_CALL
from compress.tasks.task import Examples
from compress.utils.environment import spread_cores
from compress.utils.errors import DataError, InputError
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import size_bytes

A, B = "A", "B"


class JudgedQuantity(Frozen):
    """One quantity of both models, and the verdict on it. ``change``, ``low`` and ``high`` are of B relative to A.

    They are differences of shares for answers and otherwise fractions of A's value; None while too little is known.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    change: float | None
    low: float | None = None
    high: float | None = None
    margin: float = Field(description="the smallest change that matters")
    verdict: Verdict
    observations: int = Field(description="number of requests, or groups of requests, in the estimate")
    decided_after: int | None = Field(None, description="observations until the first verdict; None without one")


class AbReport(Frozen):
    """Comparison of two models on the same traffic."""

    a: str
    b: str
    traffic: str
    requests: int
    labeled: int
    speed: float
    level: float = Field(description="probability of a wrong verdict on equally good models, at any number of looks")
    agreement: float | None = Field(None, description="share of requests with the same prediction")
    judged: tuple[JudgedQuantity, ...]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> bool:
        """Return True if B is worse in any quantity."""
        return any(quantity.verdict == "worse" for quantity in self.judged)

    @property
    def sentence(self) -> str:
        """Return all verdicts in one line, such as `B against A: accuracy worse; latency at p50 better`."""
        return f"{B} against {A}: " + "; ".join(f"{quantity.name} {quantity.verdict}" for quantity in self.judged)


@dataclass(frozen=True)
class AbOptions:
    """Settings of a comparison.

    Attributes:
        speed: Factor by which requests arrive faster than recorded.
        level: Probability of a wrong verdict on equally good models.
        margin: Smallest difference of correct answers that matters.
        cost_margin: Smallest relative change of a time or a size that matters.
        timed: Replay the traffic for latency and processor time.
    """

    speed: float = 1.0
    level: float = 0.05
    margin: float = 0.01
    cost_margin: float = 0.05
    timed: bool = True


def compare_in_use(
    models: Sequence[ServedModel], traffic: Traffic, names: Sequence[str], progress: Progress, options: AbOptions
) -> AbReport:
    """Compare two models on recorded requests.

    Args:
        models: Models A and B.
        traffic: Recorded requests.
        names: Names of the models in the report.
        progress: Shows evaluation and replay.
        options: Settings of the comparison.

    Raises:
        InputError: The task needs many calls for an answer.
    """
    if SINGLE_CALL not in models[0].task.capabilities:
        raise InputError(
            f"{models[0].task.name} takes many calls for an answer, and one call a request is replayed.",
            expected="a task that answers at once, such as text-classification",
            hint="compress compare A B --now",
        )
    sides = dict(zip((A, B), models, strict=True))
    # Requests arrive one by one, so no batch may combine them.
    examples = {name: replace(encode(model, traffic.table), unbatchable=True) for name, model in sides.items()}
    if any(len(encoded) != len(traffic) for encoded in examples.values()):
        raise InputError("Requests of this task are not one input a line.", where=traffic.name)
    notes, judged, agreement = list[str](), list[JudgedQuantity](), None
    # Answers can only be compared where each request has one class.
    if gives_classes(models[0].task):
        answers = {name: _answers(model, examples[name], progress, name) for name, model in sides.items()}
        agreement = float(np.mean(np.array(answers[A]) == np.array(answers[B])))
        # Without labels, only the agreement of both models is known.
        if traffic.labels:
            judged.append(judge_answers(answers[A], answers[B], traffic.labels, options.level, options.margin))
        else:
            notes.append("no request has a label, so correctness is unknown")
    else:
        notes.append("answers of this task are not one class a request: only latency and cost are compared")
    if options.timed:
        replayed = replay(sides, examples, traffic.at, options.speed, models[0].recipe.seed, progress)
        judged += judge_times([served for _, served in replayed], options.level, options.cost_margin)
    # Sizes are known exactly, so that the interval of their change is a point.
    a, b = (size_bytes(model.folder) for model in models)
    change = IntervalEstimate(b / a - 1, b / a - 1, b / a - 1)
    judged.append(_judge("size", "bytes", (a, b), lambda seen: change, 1, options.cost_margin))
    return AbReport(
        a=names[0],
        b=names[1],
        traffic=traffic.name,
        requests=len(traffic),
        labeled=len(traffic.labels),
        speed=options.speed,
        level=options.level,
        agreement=agreement,
        judged=tuple(judged),
        notes=tuple(notes),
    )


def judge_answers(
    a: Sequence[str], b: Sequence[str], labels: Sequence[tuple[int, str]], level: float, margin: float
) -> JudgedQuantity:
    """Judge the share of correct answers with a test that may be evaluated after every label.

    Args:
        a: Answers of model A.
        b: Answers of model B.
        labels: Numbers of requests with their labels, in the order of arrival.
        level: Probability of a wrong verdict.
        margin: Smallest difference that matters.
    """
    right = np.array([(a[number] == label, b[number] == label) for number, label in labels], dtype=bool)
    # Only requests that exactly one model answers correctly tell the models apart. Count them for B and for A.
    wins, losses = (np.cumsum(first & ~second).tolist() for first, second in (right.T[::-1], right.T))

    def estimate(seen: int) -> IntervalEstimate:
        won, lost = wins[seen - 1], losses[seen - 1]
        return mean_sequence(won, lost, seen - won - lost, 1 - level)

    share_a, share_b = right.mean(axis=0).tolist()
    return _judge("accuracy", "ratio", (share_a, share_b), estimate, len(right), margin)


def judge_times(served: Sequence[Mapping[str, ServedRequests]], level: float, margin: float) -> list[JudgedQuantity]:
    """Judge latency and processor time by the median of the ratios of B to A in each stretch of requests."""
    quantities: dict[str, Callable[[ServedRequests], float]] = {
        "latency at p50": lambda requests: _quantile(requests.latencies_ms, 0.5),
        "latency at p99": lambda requests: _quantile(requests.latencies_ms, 0.99),
        "processor time a request": lambda requests: requests.cpu_ms / len(requests.latencies_ms),
    }
    # The reported values are those of all requests. Only the verdict uses stretches.
    a, b = (
        ServedRequests(
            [latency for stretch in served for latency in stretch[side].latencies_ms],
            sum(stretch[side].cpu_ms for stretch in served),
        )
        for side in (A, B)
    )
    judged = []
    for name, value in quantities.items():
        # Both models serve a stretch one after the other, so that a disturbance of the machine cancels in the ratio.
        ratios = np.log([max(value(stretch[B]), 1e-6) / max(value(stretch[A]), 1e-6) for stretch in served])

        def estimate(seen: int, ratios: np.ndarray = ratios) -> IntervalEstimate:
            # The interval is that of the median logarithm, for which "twice as fast" and "half as fast" are symmetric.
            return IntervalEstimate(*np.expm1(median_sequence(ratios[:seen].tolist(), 1 - level)).tolist())

        judged.append(_judge(name, "ms", (value(a), value(b)), estimate, len(served), margin))
    return judged


def _quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile without interpolation."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _judge(
    name: str,
    unit: str,
    values: tuple[float, float],
    estimate: Callable[[int], IntervalEstimate],
    observations: int,
    margin: float,
) -> JudgedQuantity:
    """Apply a sequential test after each observation.

    The first verdict counts, since one might have stopped there. The interval is the one after the last observation.

    Args:
        name: Name of the quantity.
        unit: Unit of the values. Ratios are better the higher they are, all other quantities the lower.
        values: Values of A and B.
        estimate: Returns the estimated change after a number of observations.
        observations: Number of observations.
        margin: Smallest change that matters.

    Returns:
        The quantity with its verdict.
    """
    for seen in range(1, observations + 1):
        change = estimate(seen)
        # `decide` expects a loss: positive values are for the worse.
        loss = IntervalEstimate(-change.value, -change.high, -change.low) if unit == "ratio" else change
        verdict = decide(loss, margin)
        if verdict != "can't tell":
            break
    final = estimate(observations)
    low, high = (value if np.isfinite(value) else None for value in (final.low, final.high))
    return JudgedQuantity(
        name=name,
        unit=unit,
        a=values[0],
        b=values[1],
        change=final.value,
        low=low,
        high=high,
        margin=margin,
        verdict=verdict,
        observations=observations,
        decided_after=seen if verdict != "can't tell" else None,
    )


def _answers(model: ServedModel, examples: Examples, progress: Progress, name: str) -> list[str]:
    """Return the name of the predicted class of every request."""
    outputs = predict(
        model.folder, model.task, examples, model.target, model.threads, progress, f"Answers of {name}"
    ).kept
    probabilities = model.task.probabilities(outputs)
    assert probabilities is not None, "only tasks with classes are compared by their answers"
    names = artifact_labels(model.folder) or tuple(map(str, range(probabilities.shape[-1])))
    return [names[index] for index in probabilities.argmax(axis=-1).tolist()]


def named_labels(traffic: Traffic, folder: Path) -> Traffic:
    """Return the traffic with class names in place of label ids. Raises `DataError` for an unknown label."""
    names = artifact_labels(folder)
    if names is None or not traffic.labels:
        return traffic
    labels = {label for _, label in traffic.labels}
    # Labels may be the ids of the training data. Answers are names, so translate the ids.
    if are_label_ids(labels, names):
        return replace(traffic, labels=[(number, names[int(label)]) for number, label in traffic.labels])
    for label in sorted(labels - set(names)):
        raise DataError(
            f"The label {label!r} is none of the model's classes.",
            where=traffic.name,
            expected=f"one of {', '.join(names)}",
        )
    return traffic


_OPEN_SECONDS = 600.0


class ServedRequests(NamedTuple):
    """Costs of a stretch of requests: milliseconds from arrival to answer [n], and milliseconds of processor time."""

    latencies_ms: list[float]
    cpu_ms: float


def stretches(at: np.ndarray) -> list[range]:
    """Split requests into stretches whose sizes differ by at most one."""
    # More stretches, up to 40, give a more certain median, and each needs at least 5 requests for a quantile.
    count = max(1, min(40, len(at) // 5))
    return [range(*edges) for edges in pairwise(np.linspace(0, len(at), count + 1).astype(int).tolist())]


def replay(
    models: Mapping[str, ServedModel],
    examples: Mapping[str, Examples],
    at: np.ndarray,
    speed: float,
    seed: int,
    progress: Progress,
    parts: Sequence[range] = (),
) -> Iterator[tuple[range, dict[str, ServedRequests]]]:
    """Replay requests through all models, and yield each stretch with its costs for every model.

    The models run in processes of their own and serve each stretch one after the other.

    Args:
        models: Models by name.
        examples: Encoded requests for each model.
        at: Arrival times in seconds [n].
        speed: Factor by which requests arrive faster than recorded.
        seed: Seed of the coin.
        progress: Shows the stretches.
        parts: Stretches; by default those of `stretches`.

    Raises:
        StageError: A process ends.
    """
    chance = np.random.default_rng(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-ab-")))
        children = {
            name: stack.enter_context(_opened(name, model, examples[name], folder)) for name, model in models.items()
        }
        parts = parts or stretches(at)
        for part in progress.track(parts, "Replay", len(parts)):
            # Reproduce the recorded pauses within the stretch, since waiting changes caches and clock frequencies.
            gaps = np.diff(at[part.start : part.stop], prepend=at[part.start]) * 1000 / speed
            # The first model may always be slower or faster, so a coin decides which is first.
            names = list(children) if chance.random() < 0.5 else list(children)[::-1]
            costs = {}
            for name in names:
                child = children[name]
                # Processor time counts all threads of the process, which latency does not.
                cpu_seconds = float(child.memory()["cpu_seconds"])
                latencies = child.serve_requests(list(part), gaps.tolist(), _OPEN_SECONDS + sum(gaps) / 1000)
                costs[name] = ServedRequests(latencies, 1000 * (float(child.memory()["cpu_seconds"]) - cpu_seconds))
            yield part, {name: costs[name] for name in children}


def _opened(name: str, model: ServedModel, examples: Examples, folder: Path) -> WorkerProcess:
    """Start a process that serves a model, and warm it up."""
    batches = folder / f"{name}.npz"
    write_batches(batches, [examples.batch([index]) for index in range(len(examples))])
    child = WorkerProcess(name)
    try:
        child.open(model.folder, model.target, model.threads, spread_cores(model.threads), batches, _OPEN_SECONDS)
        child.load(batches, _OPEN_SECONDS)
        # The first calls include loading and compiling.
        child.round(list(range(min(8, len(examples)))), _OPEN_SECONDS)
    except BaseException:
        child.kill()
        raise
    return child
