"""Timing session of text generation at given lengths of context."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.benchmark import session
from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import LOCAL_HOST, BenchmarkHost, Workload
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.session import PRECISION, BenchmarkResult, SamplingLimits, build_result
from compress.benchmark.worker import write_batches
from compress.benchmark.workloads.text_generation import TextGenerationPlan, prompt_timing, token_timing
from compress.formats.model_file import model_files
from compress.formats.target_profile import Target
from compress.models.config_checks import max_positions
from compress.models.folder_checks import check_processor
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.utils.errors import DataError, InputError, ModelError
from compress.utils.progress import Progress

CPU_PROVIDER = "CPUExecutionProvider"


def measure_generation(
    artifacts: Mapping[str, Path],
    texts: Mapping[str, Sequence[int]],
    target: Target,
    settings: Benchmark,
    baseline: str,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
    precision: float = PRECISION,
    confidence: float = 0.95,
    other_targets: Mapping[str, Target] | None = None,
    host: BenchmarkHost = LOCAL_HOST,
) -> BenchmarkResult:
    """Time greedy generation of every artifact on ``host``, and compare each with ``artifacts[baseline]``.

    Launches of fresh processes, precision and deadline are as in `measure_side_by_side`.

    Args:
        artifacts: Model folder or file by label.
        texts: Token ids of each artifact's prompt. If it is empty, random ids are used.
        target: Target that the models run on.
        settings: Benchmark settings of the recipe.
        baseline: Label of the baseline.
        progress: Progress display.
        seed: Seed of random ids.
        timeout_seconds: Longest wait for one answer of a process.
        precision: Half the width of the interval of a ratio at which sampling stops.
        confidence: Confidence of that interval.
        other_targets: Targets of artifacts that another runtime runs, by label.
        host: Machine that the processes run on.

    Raises:
        InputError: A context is longer than the model's positions.
        DataError: A text is too short.
        ModelError: A graph is no decoder.
        StageError: The target is unavailable, or the baseline's process died or hung.
    """
    began, other_targets = time.perf_counter(), other_targets or {}
    session.check_host(artifacts, baseline, [target, *other_targets.values()], host)
    _check(artifacts, texts, settings)
    plan = TextGenerationPlan(sorted(set(settings.contexts)), settings.tokens, texts, other_targets)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        no_batches = Path(scratch) / "nothing.npz"
        write_batches(no_batches, [])
        files = dict.fromkeys(artifacts, no_batches)
        workload = Workload(artifacts, files, files, plan)
        limits = SamplingLimits(seed, timeout_seconds, precision, confidence)
        timed, conditions = session.time_workload(workload, host, target, settings, baseline, limits, began, progress)
    record, rows = timed.record.undisturbed(), []
    for name in artifacts:
        if name not in record.lost_models:
            writer = MeasurementWriter(name, plan.target(name, conditions.target).name, seed)
            for context in plan.contexts:
                rows += generation_rows(writer, record, name, context)
                rows += speedup_rows(writer, record, name, baseline, context) if len(artifacts) > 1 else []
            rows += writer.starts(record, name)
    own_environment = {
        "elsewhere": {name: target.name for name, target in other_targets.items()},
        "tokens": plan.tokens,
        "cached": record.cached,
        "prompts": "text" if texts else "random",
    }
    notes, labels = _notes(timed.record, plan, conditions), {name: name for name in artifacts}
    longer = "raise benchmark.seconds and benchmark.budget_seconds (`compress bench`: --seconds and --budget)"
    precise = "times", f"{longer}, or reduce other load on the machine"
    return build_result(timed, plan, conditions, rows, notes, precise, labels, **own_environment)


def generation_rows(writer: MeasurementWriter, record: TimingRecord, model: str, context: int) -> list[Measurement]:
    """Return the measurements of one model at one context: times, and tokens per second of each round.

    Args:
        writer: Writer of the model's measurements.
        record: Record of the session.
        model: Name of the model in the record.
        context: Number of tokens of the prompt.
    """
    first, following = record.timings[prompt_timing(context)], record.timings[token_timing(context)]
    prompt_ms = np.concatenate(first.latencies_ms(model))
    speeds = [1000 * len(latencies) / sum(latencies) for latencies in following.latencies_ms(model)]
    return [
        *writer.times(first.by_launch(model), {f"time_to_first_token_ms_context_{context}": 0.5}),
        *writer.times(following.by_launch(model), {f"time_per_output_token_ms_context_{context}": 0.5}),
        writer.medians(f"tokens_per_second_context_{context}", "tokens/s", speeds),
        writer.medians(f"prefill_tokens_per_second_context_{context}", "tokens/s", list(1000 * context / prompt_ms)),
    ]


def speedup_rows(
    writer: MeasurementWriter, record: TimingRecord, model: str, baseline: str, context: int
) -> list[Measurement]:
    """Return the speed-ups over the baseline of the first token, and of those that follow.

    Args:
        writer: Writer of the model's measurements.
        record: Record of the session.
        model: Name of the model in the record.
        baseline: Name of the baseline in the record.
        context: Number of tokens of the prompt.
    """
    return [
        writer.speedup(f"speedup_{metric}_context_{context}", record.timings[timing_name(context)], model, baseline)
        for metric, timing_name in (("time_to_first_token", prompt_timing), ("time_per_output_token", token_timing))
    ]


def _check(artifacts: Mapping[str, Path], texts: Mapping[str, Sequence[int]], settings: Benchmark) -> None:
    longest = max(settings.contexts)
    for name, path in artifacts.items():
        folder = _configured(model_files(path)[0])
        positions = None if folder is None else max_positions(read_json(folder / "config.json"))
        if positions is not None and longest + settings.tokens > positions:
            raise InputError(
                f"A context of {longest} and {settings.tokens} tokens after it are more than the model can host.",
                where=str(path),
                expected=f"at most {positions} together, its max_position_embeddings",
                hint="name a shorter --context or fewer --tokens",
            )
        if texts and len(texts[name]) < longest:
            raise DataError(
                f"The text has {len(texts[name])} tokens of this model.",
                where=str(path),
                expected=f"at least {longest}, the longest context",
                hint="give a longer text or a shorter --context",
            )


def _configured(file: Path) -> Path | None:
    """Return the folder of the file's config: its own or its parent, or None."""
    return next((folder for folder in (file.parent, file.parent.parent) if (folder / "config.json").is_file()), None)


def _notes(record: TimingRecord, plan: TextGenerationPlan, conditions: TimingConditions) -> list[str]:
    notes = []
    if not plan.texts:
        notes.append("prompts are token ids drawn at random from the middle half of the vocabulary, not text")
    uncached = [name for name, cached in record.cached.items() if not cached]
    reason = "has no KV cache (no past_key_values): every token recomputes the whole sequence"
    notes += [f"{name} {reason}" for name in uncached]
    if conditions.target.runtime == "onnxruntime" and conditions.target.provider != CPU_PROVIDER:
        notes.append("keys and values are copied through host memory between steps")
    return notes


_CHARACTERS_A_TOKEN = 64
"""Upper bound of the mean length of a token in characters, so that only the start of a large file is encoded."""


def encode_text(artifact: Path, text: Path, count: int) -> list[int]:
    """Return the first ``count`` token ids of a UTF-8 file, or all if it has fewer, with the model's tokenizer.

    Args:
        artifact: Model folder or file, with the tokenizer beside it.
        text: Text file.
        count: Number of tokens.

    Raises:
        InputError: The file is not text.
        ModelError: No tokenizer can be loaded.
    """
    try:
        with text.open(encoding="utf-8") as stream:
            content = stream.read(_CHARACTERS_A_TOKEN * count)
    except OSError as error:
        raise InputError(f"The text cannot be read: {error.strerror}.", where=str(text)) from error
    except UnicodeDecodeError as error:
        raise InputError("The file is not UTF-8 text.", where=str(text), expected="plain text") from error
    file = model_files(artifact)[0]
    folder = _configured(file)
    if folder is None:
        raise ModelError(
            "There is no config.json beside the model, and so no tokenizer to read the text with.",
            where=str(file.parent),
            expected="a folder with config.json and the tokenizer's files",
            hint="leave out --text to use random tokens",
        )
    check_processor(folder, read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    return [int(token) for token in tokenizer(content, verbose=False)["input_ids"][:count]]
