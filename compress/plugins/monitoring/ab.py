"""Comparison of two models on recorded traffic: answers, latency and cost, with intervals that hold at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from compress.data.columns import are_label_ids
from compress.evaluation.evaluate import artifact_labels, predict
from compress.models.processor import load_processor
from compress.numerics.differences import Verdict, decide
from compress.numerics.hypothesis_tests import mean_sequence, median_sequence
from compress.numerics.statistics import Estimate
from compress.plugins.monitoring.outputs import Model, gives_classes
from compress.plugins.monitoring.replay import ServedRequests, replay
from compress.plugins.monitoring.traffic import Traffic
from compress.tasks.capability import SINGLE_CALL
from compress.tasks.task import Examples
from compress.utils.errors import DataError, InputError
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import size_bytes

A, B = "A", "B"
_TAIL = 0.99
Look = Callable[[int], Estimate | None]


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
    looks: int = Field(description="how many requests, or stretches of them, it rests on")
    told_after: int | None = Field(None, description="the look at which it was first known, if it is")


class AbReport(Frozen):
    """Comparison of two models on the same traffic."""

    a: str
    b: str
    traffic: str
    requests: int
    labeled: int
    speed: float
    level: float = Field(description="how often a verdict of equally good models is wrong, however often one looks")
    agreement: float | None = Field(None, description="share of requests that both give the same answer")
    judged: tuple[JudgedQuantity, ...]
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> bool:
        """Return True if B is worse in any quantity."""
        return any(one.verdict == "worse" for one in self.judged)

    @property
    def sentence(self) -> str:
        """Return all verdicts in one line, such as `B against A: accuracy worse; latency at p50 better`."""
        return f"{B} against {A}: " + "; ".join(f"{one.name} {one.verdict}" for one in self.judged)


def compare_in_use(
    models: tuple[Model, Model],
    traffic: Traffic,
    names: tuple[str, str],
    progress: Progress,
    *,
    speed: float = 1.0,
    level: float = 0.05,
    margin: float = 0.01,
    cost_margin: float = 0.05,
    timed: bool = True,
) -> AbReport:
    """Compare two models on recorded requests.

    Args:
        models: Models A and B.
        traffic: Recorded requests.
        names: Names of the models in the report.
        progress: Shows evaluation and replay.
        speed: Factor by which requests arrive faster than recorded.
        level: Probability of a wrong verdict on equally good models.
        margin: Smallest difference of correct answers that matters.
        cost_margin: Smallest relative change of a time or a size that matters.
        timed: Replay the traffic for latency and processor time.

    Returns:
        The report.

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
    examples = {name: _alone(model, traffic) for name, model in sides.items()}
    notes, judged, agreement = list[str](), list[JudgedQuantity](), None
    if gives_classes(models[0].task):
        answers = {name: _answers(model, examples[name], progress, name) for name, model in sides.items()}
        agreement = float(
            np.mean(
                [
                    first_answer == second_answer
                    for first_answer, second_answer in zip(answers[A], answers[B], strict=True)
                ]
            )
        )
        if traffic.labels:
            judged.append(judge_answers(answers[A], answers[B], traffic.labels, level, margin))
        else:
            notes.append("no request has a label, so that nobody knows which answers are right")
    else:
        notes.append("answers of this task are not one class a request: only latency and cost are judged")
    if timed:
        served = [
            served_by_model
            for _, served_by_model in replay(sides, examples, traffic.at, speed, models[0].recipe.seed, progress)
        ]
        judged += judge_times(served, level, cost_margin)
    judged.append(_sizes(models, cost_margin))
    return AbReport(
        a=names[0],
        b=names[1],
        traffic=traffic.name,
        requests=len(traffic),
        labeled=len(traffic.labels),
        speed=speed,
        level=level,
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
    wins, losses = (np.cumsum(first & ~second).tolist() for first, second in (right.T[::-1], right.T))

    def look(seen: int) -> Estimate:
        won, lost = wins[seen - 1], losses[seen - 1]
        return mean_sequence(won, lost, seen - won - lost, 1 - level)

    values = right.mean(axis=0).tolist()
    return _judge("accuracy", "ratio", (values[0], values[1]), look, len(right), margin, higher_is_better=True)


def judge_times(served: Sequence[Mapping[str, ServedRequests]], level: float, margin: float) -> list[JudgedQuantity]:
    """Judge latency and processor time by the median of the ratios of B to A in each stretch of requests."""
    quantities: list[tuple[str, float, Callable[[ServedRequests], float]]] = [
        ("latency at p50", 0.5, lambda one: _quantile(one.latencies_ms, 0.5)),
        ("latency at p99", _TAIL, lambda one: _quantile(one.latencies_ms, _TAIL)),
        ("processor time a request", 0.0, lambda one: one.cpu_ms / len(one.latencies_ms)),
    ]
    judged = []
    for name, share, of in quantities:
        ratios = np.log([max(of(stretch[B]), 1e-6) / max(of(stretch[A]), 1e-6) for stretch in served])

        def look(seen: int, ratios: np.ndarray = ratios) -> Estimate:
            return Estimate(*np.expm1(median_sequence(ratios[:seen].tolist(), 1 - level)).tolist())

        values = [_whole(served, side, share) for side in (A, B)]
        judged.append(_judge(name, "ms", (values[0], values[1]), look, len(served), margin, higher_is_better=False))
    return judged


def _whole(served: Sequence[Mapping[str, ServedRequests]], side: str, share: float) -> float:
    """Return a quantile of all latencies, or the mean processor time for a share of 0."""
    latencies = [value for stretch in served for value in stretch[side].latencies_ms]
    return _quantile(latencies, share) if share else sum(stretch[side].cpu_ms for stretch in served) / len(latencies)


def _quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile without interpolation."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _judge(
    name: str,
    unit: str,
    values: tuple[float, float],
    look: Callable[[int], Estimate],
    looks: int,
    margin: float,
    higher_is_better: bool,
) -> JudgedQuantity:
    """Apply a sequential test after each observation.

    The first verdict counts, since one might have stopped there. The interval is the one after the last observation.

    Args:
        name: Name of the quantity.
        unit: Unit of the values.
        values: Values of A and B.
        look: Returns the estimated change after a number of observations.
        looks: Number of observations.
        margin: Smallest change that matters.
        higher_is_better: Direction of the quantity.

    Returns:
        The quantity with its verdict.
    """
    for seen in range(1, looks + 1):
        change = look(seen)
        loss = Estimate(-change.value, -change.high, -change.low) if higher_is_better else change
        verdict = decide(loss, margin)
        if verdict != "can't tell":
            break
    final = look(looks)
    low, high = (value if np.isfinite(value) else None for value in (final.low, final.high))
    first_known = seen if verdict != "can't tell" else None
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
        looks=looks,
        told_after=first_known,
    )


def _sizes(models: tuple[Model, Model], margin: float) -> JudgedQuantity:
    """Judge the sizes of both models, which are known exactly."""
    a, b = (size_bytes(model.folder) for model in models)
    change = b / a - 1
    values = {"name": "size", "unit": "bytes", "a": a, "b": b, "change": change, "low": change, "high": change}
    verdict = decide(Estimate(change, change, change), margin)
    return JudgedQuantity(**values, margin=margin, verdict=verdict, looks=1, told_after=1)


def _alone(model: Model, traffic: Traffic) -> Examples:
    """Encode every request as an input of its own."""
    processor = load_processor(model.folder)
    examples = model.task.encode(traffic.table, processor, None, model.recipe.data.max_length)
    labels = np.zeros(len(examples), dtype=np.int64) if examples.labels is None else examples.labels
    if len(examples) != len(traffic):
        raise InputError("Requests of this task are not one input a line.", where=traffic.name)
    return replace(examples, labels=labels, unbatchable=True)


def _answers(model: Model, examples: Examples, progress: Progress, name: str) -> list[str]:
    """Return the name of the predicted class of every request."""
    outputs = predict(
        model.folder, model.task, examples, model.target, model.threads, progress, f"Answers of {name}"
    ).kept
    probabilities = model.task.probabilities(outputs)
    assert probabilities is not None, "asked of tasks with classes"
    chosen = probabilities.argmax(axis=-1).tolist()
    names = artifact_labels(model.folder) or tuple(map(str, range(probabilities.shape[-1])))
    return [names[index] for index in chosen]


def named_labels(traffic: Traffic, folder: Path) -> Traffic:
    """Return the traffic with class names in place of label ids. Raises `DataError` for an unknown label."""
    names = artifact_labels(folder)
    if names is None or not traffic.labels:
        return traffic
    given = {label for _, label in traffic.labels}
    if are_label_ids(given, names):
        return replace(traffic, labels=[(number, names[int(label)]) for number, label in traffic.labels])
    for label in sorted(given - set(names)):
        raise DataError(
            f"The label {label!r} is none of the model's classes.",
            where=traffic.name,
            expected=f"one of {', '.join(names)}",
        )
    return traffic
