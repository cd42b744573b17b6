"""`compress bench ARTIFACT --context N`: text generation, which needs no recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.benchmark.generation import encode_text, measure_generation
from compress.benchmark.host import BenchmarkHost
from compress.benchmark.session import BenchmarkResult
from compress.cli.artifact import generating_artifact
from compress.cli.bench_hosts import Measure
from compress.cli.console_progress import ConsoleProgress
from compress.formats.model_file import format_of
from compress.formats.quiet_output import quiet_libraries
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS, find_target
from compress.recipe.recipe import Benchmark
from compress.utils.errors import InputError
from compress.utils.progress import Progress


def refuse_together(context: list[int] | None, **options: object) -> None:
    """Raise `InputError` for options that have no effect with ``--context``, or without it."""
    idle = ("recipe", "batch_size", "rate", "steps", "size") if context else ("tokens", "text")
    given = [f"--{name.replace('_', '-')}" for name in idle if options[name] is not None]
    if given and context:
        raise InputError(
            f"{', '.join(given)} and --context don't go together.",
            expected="--context with --tokens, --text, --baseline, --target, --threads, --seconds or --budget",
        )
    if given:
        raise InputError(
            f"{', '.join(given)} without --context.",
            expected="--context N, the tokens of a prompt, to time text generation",
        )


def generation_bench(
    artifact: Path, baseline: Path | None, text: Path | None, target: str, settings: Benchmark
) -> Measure:
    """Return a function that times one artifact, or two interleaved, on a host. Raises the errors of `encode_text`.

    Args:
        artifact: Artifact that is timed.
        baseline: Artifact to compare with.
        text: File whose text is the prompt, or None for random tokens.
        target: Name of the target.
        settings: Benchmark settings.
    """
    found_target = find_target(target)
    quiet_libraries()
    artifacts = {"artifact": artifact} if baseline is None else {"baseline": baseline, "artifact": artifact}
    folders = {label: generating_artifact(path) for label, path in artifacts.items()}
    other_targets = targets_of_other_formats(folders, found_target)
    longest = max(settings.contexts)
    texts = {} if text is None else {label: encode_text(folder, text, longest) for label, folder in folders.items()}
    progress = ConsoleProgress()
    for label, other in other_targets.items():
        progress.note(
            f"{label} is {other.format.upper()}, which {found_target.name} does not open; it runs on {other.name}"
        )
    reference = next(iter(folders))

    def measure(where: BenchmarkHost, shown: Progress) -> BenchmarkResult:
        return measure_generation(
            folders, texts, found_target, settings, reference, shown, seed=0, other_targets=other_targets, host=where
        )

    return measure


def targets_of_other_formats(folders: Mapping[str, Path], target: Target) -> dict[str, Target]:
    """Return the first target that can open the artifact, for each artifact that ``target`` cannot open."""
    formats = {label: format_of(folder) for label, folder in folders.items()}
    return {
        label: next(other for other in TARGETS.values() if other.format == form)
        for label, form in formats.items()
        if form != target.format
    }
