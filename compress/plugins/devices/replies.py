"""Replies of a device, which are checked before use: it may be broken, or another machine may answer in its place."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compress.benchmark.record import BATCHED_MEMORY, PEAK_MEMORY, TimingRecord
from compress.benchmark.restarts import TimingResult, Workload
from compress.benchmark.rounds import TimedRounds
from compress.benchmark.workloads.calls import BATCHED, SINGLE, CallPlan
from compress.utils.read_limits import parse_json


def printable(text: str) -> str:
    """Return text from a device without characters that control a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


_THREADS = "intra_op_threads"
_LARGEST = 1e18
Text = Annotated[str, AfterValidator(printable)]
Count = Annotated[int, Field(ge=0)]


class _Received(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Holder(_Received):
    """Session that holds the device."""

    who: Text
    since: Text
    session: Text = ""
    pid: Count = 0


class Refusal(_Received):
    """Refusal of the agent; see `agent.RefusedError`."""

    what: Text
    expected: Text | None


class ErrorReply(_Received):
    """Error of the harness; see `compress.benchmark.subprocess_client.error_reply`."""

    kind: Text
    what: Text
    where: Text | None
    expected: Text | None
    hint: Text | None


class SessionResult(_Received):
    """Result of a session: a timing, or why there is none. Other fields are kept for programs beside the harness."""

    model_config = ConfigDict(extra="allow")
    timed: dict[str, Any] | None = None
    error: ErrorReply | None = None
    refusal: Refusal | None = None


class _Environment(_Received):
    """Fields of a session's environment that are read; the others are only reported."""

    packages: dict[Text, Text]
    cores: Annotated[int, Field(ge=1)]
    cores_granted: Annotated[int, Field(ge=1)] | None


class AgentReply(_Received):
    """Every field of the agent's replies; `agent` documents which action answers with which."""

    holder: Holder | None = None
    refusal: Refusal | None = None
    cache: Text = ""
    python: Text = ""
    platform: Text = ""
    free_bytes: Count = 0
    present: list[str] = []
    parts: dict[str, Count] = {}
    has_environment: bool = False
    bytes: Count = 0
    offset: Count = 0
    kept: bool = False
    note: Text = ""
    done: Count = 0
    ended: bool = False
    result: SessionResult | None = None
    log: Text = ""


REQUIRED = {
    "begin": {"holder"},
    "clear": {"holder", "bytes"},
    "probe": {"cache", "python", "platform", "free_bytes", "present", "parts", "has_environment", "holder"},
}
"""Fields that the answer to an action must have."""


def read_reply(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a reply, or None for a line that a login script wrote. Raises `ValueError` for others."""
    try:
        content = parse_json(line)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    try:
        return AgentReply.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def read_timing(content: Mapping[str, Any], workload: Workload, batched: bool) -> TimingResult:
    """Return the result of a timing session. Raises `ValueError` for one that this workload cannot have."""
    try:
        timed = TypeAdapter(TimingResult).validate_python(content)
        _Environment.model_validate(timed.environment)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    record, lost = timed.record, timed.record.lost_models.keys()
    _check_session(record)
    if missing := set(workload.plan.timings) - record.timings.keys():
        raise ValueError(f"no times of {', '.join(sorted(missing))}")
    calls = range(max(workload.plan.singles) + 1) if isinstance(workload.plan, CallPlan) else None
    for kind, rounds in record.timings.items():
        if not rounds.times.keys() <= workload.artifacts.keys() <= rounds.times.keys() | lost:
            raise ValueError(f"{kind}: times of other models than were sent")
        if not rounds.calls and (batched or kind != BATCHED):
            raise ValueError(f"{kind}: no rounds")
        _check_rounds(kind, rounds, calls if kind == SINGLE else None)
    needed = {PEAK_MEMORY, *((BATCHED_MEMORY,) if batched and isinstance(workload.plan, CallPlan) else ())}
    for model in workload.artifacts.keys() - lost:
        figures = record.figures.get(model, {})
        if not needed <= figures.keys() or not all(figures.values()):
            raise ValueError(f"no memory or start-up times of {model}")
    return timed


def _check_session(record: TimingRecord) -> None:
    """Raise `ValueError` for numbers and settings that no session has."""
    # The comparison is also false for NaN. Integers may be too large for a float.
    if not all(abs(number) < _LARGEST for number in _numbers(asdict(record))):
        raise ValueError("numbers that are not finite")
    settings = record.settings.values()
    if not all(isinstance(of_model, dict) and type(of_model.get(_THREADS, 1)) is int for of_model in settings):
        raise ValueError("settings that are no settings")
    if record.usage.elapsed <= 0 or not record.reference:
        raise ValueError("a session without duration or without reference times")


def _check_rounds(kind: str, rounds: TimedRounds, calls: Container[int] | None) -> None:
    """Raise `ValueError` for times that are no times, and for lists of rounds that do not fit together."""
    if len({len(rounds.calls), len(rounds.launches), len(rounds.product_ms), *map(len, rounds.times.values())}) > 1:
        raise ValueError(f"{kind}: a different number of rounds for each model")
    if calls is not None and not all(call in calls for numbers in rounds.calls for call in numbers):
        raise ValueError(f"{kind}: calls of other examples than were sent")
    for index, numbers in enumerate(rounds.calls):
        of_round = [times[index] for times in rounds.times.values()]
        marks = {len(times.disturbed) for times in of_round}
        counts = {len(numbers), *(len(times.latencies_ms) for times in of_round)}
        if len(counts) > 1 or not numbers or not marks <= {0, len(numbers)}:
            raise ValueError(f"{kind}: a round without calls, or with another number of times than calls")
        positive = (rounds.product_ms[index], *(number for times in of_round for number in times.latencies_ms))
        if len(marks) > 1 or not all(number > 0 for number in positive):
            raise ValueError(f"{kind}: times that are not positive, or not marked for each model")


def _numbers(value: object) -> list[float]:
    """Return all numbers in nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _first(error: ValidationError) -> str:
    """Return the first problem in one line, without the value."""
    problem = error.errors()[0]
    return printable(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
