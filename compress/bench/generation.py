"""Text generation timed at given lengths of context, artifacts side by side: from opened graphs to measurement rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.generation_launches import GenerationRecord, GenerationWork
from compress.bench.launches import FEWEST_LAUNCHES
from compress.bench.noise import Noise, judge
from compress.bench.place import HERE, LaunchHost, Timed
from compress.bench.record import Conditions
from compress.bench.results import Writer
from compress.bench.rounds import Rounds, count, note_on
from compress.bench.session import PRECISION, BenchResult
from compress.bench.worker import write_batches
from compress.checkpoints.json_file import read_json
from compress.errors import DataError, InputError, StageError
from compress.formats.model_file import model_file
from compress.measurement import MACHINE, Measurement
from compress.progress import Progress
from compress.targets import Target

CPU_PROVIDER = "CPUExecutionProvider"
_EVALUATION_SHARE = 0.05
"""The part of a time budget that is kept for the statistics."""


@dataclass(frozen=True)
class GenerationSettings:
    """``contexts``: tokens of the prompts; ``tokens``: how many are generated after the first.

    ``seconds`` of sampling for each model and context, or ``budget_seconds`` for everything; sets of fresh processes
    are ``launches`` at least.
    """

    contexts: tuple[int, ...]
    tokens: int = 32
    threads: int = 2
    seconds: float = 3.0
    budget_seconds: float | None = None
    launches: int = FEWEST_LAUNCHES


def measure_generation(
    artifacts: Mapping[str, Path],
    texts: Mapping[str, Sequence[int]],
    target: Target,
    settings: GenerationSettings,
    baseline: str,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
    precision: float = PRECISION,
    confidence: float = 0.95,
    elsewhere: Mapping[str, Target] | None = None,
    place: LaunchHost = HERE,
) -> BenchResult:
    """Time greedy generation of every artifact at ``place``, and compare each with ``artifacts[baseline]``.

    All run on ``target``, but those named in ``elsewhere`` on the target there: other runtimes take part in the turns.

    ``texts`` has the token ids to prompt each artifact with; where it is empty, ids are drawn by ``seed``. Launches of
    fresh processes, precision and deadline are as in `measure_together`. Raises `InputError` for settings that mean
    nothing or a context beyond the model's positions, `DataError` for a text that is too short, `ModelError` for a
    graph that is no decoder, `StageError` where the target is not to be had or the baseline's process ends.
    """
    budget = settings.budget_seconds
    deadline = None if budget is None else time.perf_counter() + (1 - _EVALUATION_SHARE) * budget
    _check(artifacts, texts, settings, baseline)
    other = elsewhere or {}
    for wanted in dict.fromkeys((target, *other.values())):
        reason = place.why_unavailable(wanted)
        if reason is not None:
            raise StageError(f"The target {wanted.name!r} is not to be had here: {reason}")
    conditions = Conditions(
        target=place.target(target),
        launches=settings.launches,
        threads=settings.threads,
        cores=(),
        seconds=settings.seconds,
        deadline=None,
        batched=False,
        rate=None,
        precision=precision,
        confidence=confidence,
        seed=seed,
        timeout_seconds=timeout_seconds,
    )
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        nothing = Path(scratch) / "nothing.npz"
        write_batches(nothing, [])
        contexts = tuple(sorted(set(settings.contexts)))
        work = GenerationWork(artifacts, contexts, settings.tokens, texts, nothing, other)
        left = None if deadline is None else deadline - time.perf_counter()
        timed = place.generate(work, conditions, baseline, left, progress)
    return _result(timed, work, conditions, baseline)


def generation_rows(writer: Writer, record: GenerationRecord, model: str, context: int) -> list[Measurement]:
    """Prompt and steps of one model at one context: times, and tokens per second of each round."""
    first, steps = record.first[context], record.steps[context]
    prompts = np.concatenate(first.latencies_ms(model))
    speeds = [1000 * len(latencies) / sum(latencies) for latencies in steps.latencies_ms(model)]
    return [
        _times(writer, f"time_to_first_token_ms_context_{context}", first, model),
        _times(writer, f"time_per_output_token_ms_context_{context}", steps, model),
        writer.medians(f"tokens_per_second_context_{context}", "tokens/s", speeds),
        writer.medians(f"prefill_tokens_per_second_context_{context}", "tokens/s", list(1000 * context / prompts)),
    ]


def speedup_rows(
    writer: Writer, record: GenerationRecord, model: str, baseline: str, context: int
) -> list[Measurement]:
    """How many times faster than the baseline, launch by launch: the first token, and those that follow."""
    return [
        writer.speedup(f"speedup_{what}_context_{context}", rounds[context], model, baseline)
        for what, rounds in (("time_to_first_token", record.first), ("time_per_output_token", record.steps))
    ]


def _times(writer: Writer, metric: str, rounds: Rounds, model: str) -> Measurement:
    pooled = np.concatenate(rounds.latencies_ms(model))
    (interval,) = writer.intervals(rounds.by_launch(model), (0.5,))
    return writer.row(metric, float(np.median(pooled)), "ms", interval, pooled)


def _check(
    artifacts: Mapping[str, Path], texts: Mapping[str, Sequence[int]], settings: GenerationSettings, baseline: str
) -> None:
    if baseline not in artifacts:
        raise InputError(f"The baseline {baseline!r} is not among the models.", expected=", ".join(artifacts))
    if not settings.contexts or min(settings.contexts) < 1:
        raise InputError("A context has a token at least.", expected="contexts of 1 token or more, e.g. --context 128")
    if settings.tokens < 1 or settings.threads < 1:
        raise InputError(
            f"{settings.tokens} tokens by {settings.threads} threads are nothing to time.", expected="1 or more of each"
        )
    longest = max(settings.contexts)
    for name, path in artifacts.items():
        positions = _positions(model_file(path))
        if positions is not None and longest + settings.tokens > positions:
            raise InputError(
                f"A context of {longest} and {settings.tokens} tokens after it are more than the model can place.",
                where=str(path),
                expected=f"at most {positions} together, its max_position_embeddings",
                mend="name a shorter --context or fewer --tokens",
            )
        if texts and len(texts[name]) < longest:
            raise DataError(
                f"The text has {len(texts[name])} tokens of this model.",
                where=str(path),
                expected=f"at least {longest}, the longest context",
                mend="give a longer text or a shorter --context",
            )


def _positions(file: Path) -> int | None:
    """The longest text that the config beside the file or in the folder above allows, where there is one."""
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            nested = config.get("text_config") or {}
            found = config.get("max_position_embeddings", nested.get("max_position_embeddings"))
            return found if isinstance(found, int) else None
    return None


def _result(timed: Timed[GenerationRecord], work: GenerationWork, conditions: Conditions, baseline: str) -> BenchResult:
    record = timed.record.undisturbed()
    session = record.session
    rows: list[Measurement] = []
    for name in work.artifacts:
        if name in session.lost:
            continue
        writer = Writer(name, work.elsewhere.get(name, conditions.target).name, conditions.seed)
        for context in work.contexts:
            rows += generation_rows(writer, record, name, context)
            if len(work.artifacts) > 1:
                rows += speedup_rows(writer, record, name, baseline, context)
        rows += [
            writer.medians("peak_memory_bytes", "bytes", session.single_bytes[name]),
            writer.medians("startup_ms", "ms", session.startup_ms[name]),
            writer.medians("session_load_ms", "ms", session.session_load_ms[name]),
            writer.medians("runtime_memory_bytes", "bytes", session.runtime_bytes[name]),
        ]
    rows += Writer(MACHINE, conditions.target.name, conditions.seed).reference(session.reference)
    noise = judge(
        session.usage,
        {name: _relative_rounds(record, name) for name in work.artifacts if name not in session.lost},
        timed.load,
        np.concatenate([rounds.pulses_ms for rounds in record.first.values()]),
        session.frequencies_mhz,
        timed.environment["cores"],
        timed.environment["cores_granted"],
    )
    whole = timed.record
    left_out = [note_on(whole.first[context], kept, f" of context {context}") for context, kept in record.first.items()]
    notes = [str(noise), *filter(None, left_out), *_notes(timed, work, conditions)]
    rounds = count(whole.rounds(), record.rounds())
    return BenchResult(rows, notes, _environment(timed, work, rounds, noise, conditions))


def _relative_rounds(record: GenerationRecord, model: str) -> np.ndarray:
    return np.concatenate([rounds.relative_rounds(model) for rounds in record.timings()])


def _notes(timed: Timed[GenerationRecord], work: GenerationWork, conditions: Conditions) -> list[str]:
    record, session, precision = timed.record, timed.record.session, timed.precision
    notes = []
    if not work.texts:
        notes.append("prompts are token ids drawn at random from the middle half of the vocabulary, not text")
    for name, cached in record.cached.items():
        if not cached and name not in session.lost:
            notes.append(f"{name} keeps no cache (no past_key_values): every token runs the whole sequence again")
    if conditions.target.runtime == "onnxruntime" and conditions.target.provider != CPU_PROVIDER:
        notes.append("keys and values pass through the processor's memory between steps")
    granted = timed.environment["cores_granted"]
    if conditions.threads > granted:
        notes.append(f"{conditions.threads} threads share the {granted} cores that are granted")
    restless = [name for name, warm in session.warm_ups.items() if 2 * sum(w.steady for w in warm) < len(warm)]
    if restless:
        notes.append(f"not steady after most warm-ups: {', '.join(restless)}")
    if precision > conditions.precision:
        known = "are known from one launch only" if precision == float("inf") else f"are known within {precision:.1%}"
        notes.append(
            f"after {session.launches} launches times {known}, not within the {conditions.precision:.1%} aimed at; "
            "raise --seconds or --budget, or quieten the machine"
        )
    return notes + [f"{name} was not timed to the end: {reason}" for name, reason in session.lost.items()]


def _environment(
    timed: Timed[GenerationRecord],
    work: GenerationWork,
    rounds: Mapping[str, Any],
    noise: Noise,
    conditions: Conditions,
) -> dict[str, Any]:
    record, session = timed.record, timed.record.session
    return {
        **timed.environment,
        "target": asdict(conditions.target),
        "elsewhere": {name: target.name for name, target in work.elsewhere.items()},
        "threads": conditions.threads,
        "pinned_cores": list(timed.cores),
        "runtime_settings": session.settings,
        "launches": session.launches,
        **rounds,
        "tokens": work.tokens,
        "cached": record.cached,
        "prompts": "text" if work.texts else "random",
        "warm_up_rounds": {name: [warm.rounds for warm in warms] for name, warms in session.warm_ups.items()},
        "noise": {**asdict(noise), "reasons": list(noise.reasons)},
    }
