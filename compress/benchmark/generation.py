"""Text generation timed at given lengths of context, artifacts side by side: from opened graphs to measurement rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.benchmark.host import LOCAL_HOST, BenchmarkHost
from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import Workload
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.session import PRECISION, BenchmarkResult, build_result, check_host, seconds_left
from compress.benchmark.worker import write_batches
from compress.benchmark.workloads.text_generation import TextGenerationPlan, prompt_timing, token_timing
from compress.formats.model_file import model_files
from compress.formats.target_profile import Target
from compress.models.config_checks import positions_of
from compress.models.folder_checks import check_processor
from compress.models.json_file import read_json
from compress.models.processor import load_tokenizer
from compress.recipe.recipe import Benchmark
from compress.results.measurement import Measurement
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
    """Time greedy generation of every artifact at ``place``, and compare each with ``artifacts[baseline]``.

    All run on ``target``, but those named in ``elsewhere`` on the target there: other runtimes take part in the turns.

    ``texts`` has the token ids to prompt each artifact with; where it is empty, ids are drawn by ``seed``. Launches of
    fresh processes, precision and deadline are as in `measure_side_by_side`. Raises `InputError` for a context beyond the
    model's positions, `DataError` for a text that is too short, `ModelError` for a graph that is no decoder,
    `StageError` where the target is not to be had or the baseline's process ends.
    """
    began, other_targets = time.perf_counter(), other_targets or {}
    check_host(artifacts, baseline, [target, *other_targets.values()], host)
    _check(artifacts, texts, settings)
    plan = TextGenerationPlan(sorted(set(settings.contexts)), settings.tokens, texts, other_targets)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        nothing = Path(scratch) / "nothing.npz"
        write_batches(nothing, [])
        files = dict.fromkeys(artifacts, nothing)
        conditions = TimingConditions(
            target=host.target(target),
            baseline=baseline,
            threads=settings.threads,
            launches=settings.launches,
            seconds=settings.seconds,
            precision=precision,
            confidence=confidence,
            seed=seed,
            timeout_seconds=timeout_seconds,
            seconds_left=seconds_left(settings.budget_seconds, began),
        )
        timed = host.time(Workload(artifacts, files, files, plan), conditions, progress)
    record, rows = timed.record.undisturbed(), []
    for name in artifacts:
        if name not in record.lost_models:
            writer = MeasurementWriter(name, plan.target(name, conditions.target).name, seed)
            for context in plan.contexts:
                rows += generation_rows(writer, record, name, context)
                rows += speedup_rows(writer, record, name, baseline, context) if len(artifacts) > 1 else []
            rows += writer.starts(record, name)
    return build_result(
        timed,
        plan,
        conditions,
        rows,
        _notes(timed.record, plan, conditions),
        ("times", "raise --seconds or --budget, or quieten the machine"),
        dict(zip(artifacts, artifacts, strict=True)),
        elsewhere={name: target.name for name, target in other_targets.items()},
        tokens=plan.tokens,
        cached=record.cached,
        prompt_timing="text" if texts else "random",
    )


def generation_rows(writer: MeasurementWriter, record: TimingRecord, model: str, context: int) -> list[Measurement]:
    """Prompt and steps of one model at one context: times, and tokens per second of each round."""
    first, following = record.timings[prompt_timing(context)], record.timings[token_timing(context)]
    read_ms = np.concatenate(first.latencies_ms(model))
    speeds = [1000 * len(latencies) / sum(latencies) for latencies in following.latencies_ms(model)]
    return [
        *writer.times(first.by_launch(model), {f"time_to_first_token_ms_context_{context}": 0.5}),
        *writer.times(following.by_launch(model), {f"time_per_output_token_ms_context_{context}": 0.5}),
        writer.medians(f"tokens_per_second_context_{context}", "tokens/s", speeds),
        writer.medians(f"prefill_tokens_per_second_context_{context}", "tokens/s", list(1000 * context / read_ms)),
    ]


def speedup_rows(writer: MeasurementWriter, record: TimingRecord, model: str, baseline: str, context: int) -> list[Measurement]:
    """How many times faster than the baseline, launch by launch: the first token, and those that follow."""
    return [
        writer.speedup(f"speedup_{what}_context_{context}", record.timings[timing(context)], model, baseline)
        for what, timing in (("time_to_first_token", prompt_timing), ("time_per_output_token", token_timing))
    ]


def _check(artifacts: Mapping[str, Path], texts: Mapping[str, Sequence[int]], settings: Benchmark) -> None:
    longest = max(settings.contexts)
    for name, path in artifacts.items():
        positions = _positions(model_files(path)[0])
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


def _positions(file: Path) -> int | None:
    """The longest text that the config beside the file or in the folder above allows, where there is one."""
    folder = _configured(file)
    return None if folder is None else positions_of(read_json(folder / "config.json"))


def _configured(file: Path) -> Path | None:
    """The folder of the file's config: its own, or the one above."""
    return next((one for one in (file.parent, file.parent.parent) if (one / "config.json").is_file()), None)


def _notes(record: TimingRecord, plan: TextGenerationPlan, conditions: TimingConditions) -> list[str]:
    notes = []
    if not plan.texts:
        notes.append("prompts are token ids drawn at random from the middle half of the vocabulary, not text")
    for name, cached in record.cached.items():
        if not cached:
            notes.append(f"{name} keeps no cache (no past_key_values): every token runs the whole sequence again")
    if conditions.target.runtime == "onnxruntime" and conditions.target.provider != CPU_PROVIDER:
        notes.append("keys and values pass through the processor's memory between steps")
    return notes


_CHARACTERS_A_TOKEN = 64
"""Nobody's tokens are longer on average, so that no more of a large file has to be encoded."""


def encode_text(artifact: Path, text: Path, count: int) -> list[int]:
    """The first ``count`` token ids of a UTF-8 file, or all where it has fewer, by the tokenizer beside the model.

    Raises `InputError` for a file that is no text, `ModelError` where there is no tokenizer that loads.
    """
    try:
        with text.open(encoding="utf-8") as stream:
            content = stream.read(_CHARACTERS_A_TOKEN * count)
    except OSError as error:
        raise InputError(f"The text cannot be read: {error.strerror}.", where=str(text)) from error
    except UnicodeDecodeError as error:
        raise InputError("The file is no text in UTF-8.", where=str(text), expected="plain text") from error
    file = model_files(artifact)[0]
    folder = _configured(file)
    if folder is None:
        raise ModelError(
            "There is no config.json beside the model, and so no tokenizer to read the text with.",
            where=str(file.parent),
            expected="a folder with config.json and the tokenizer's files",
            hint="leave out --text: tokens are drawn at random then",
        )
    check_processor(folder, read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    return [int(token) for token in tokenizer(content, verbose=False)["input_ids"][:count]]
