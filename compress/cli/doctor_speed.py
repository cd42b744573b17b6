"""`compress doctor MODEL --against FLOAT`: which operators make the 8-bit file slower than its float file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.bench.difference import OperatorDifference
from compress.bench.operator_difference import compare_operators
from compress.bench.profiled_calls import CALLS, Calls, batch_calls
from compress.cli.artifact import Artifact, find_artifact, has_recipe
from compress.cli.output import Finding
from compress.cli.run_outputs import outputs_of, run_of
from compress.errors import InputError
from compress.formats.onnx.model import find_graphs
from compress.formats.silence import quiet_libraries
from compress.formats.targets import TARGETS
from compress.inspect.transcription_calls import transcription_calls
from compress.pipeline.notes import float_label, has_integers
from compress.progress import Progress
from compress.recipe.recipe import Recipe
from compress.report.difference_console import cause_text, verdict_text
from compress.tasks.capability import GENERATES, READS_ROWS

_NAMED = 3
_RECORDINGS = 2
"""Of a model of two graphs: each has a prompt, which its decoder reads once, and tokens."""


def speed_findings(
    model: Path, recipe: Path | None, against: Path | None, seconds: float, progress: Progress
) -> tuple[list[Finding], list[OperatorDifference]]:
    """What time says, and a record for each graph; nothing where there is no float file to compare with.

    Raises `InputError` for a float file that was named and can't be compared.
    """
    if against is None and recipe is None and not has_recipe(model):
        return [], []
    found = find_artifact(model, recipe)
    floats = against if against is not None else _of_run(model, found.recipe)
    if floats is None:
        return [Finding("ok", "its float file is not in the cache, so nothing was timed", "--against FLOAT")], []
    if GENERATES in found.task.capabilities or READS_ROWS not in found.task.capabilities:
        if against is None:
            return [], []
        raise InputError(
            f"Files of {found.task.name} are not compared operator by operator.",
            where="--against",
            mend="`compress profile` of each file, and `compress compare A B --now` for their speed",
        )
    differences = _differences(found, floats, seconds, progress)
    return [finding for each in differences for finding in _named(each, len(differences) > 1)], differences


def _of_run(model: Path, recipe: Recipe) -> Path | None:
    """The float file that a run's integers were made of, if its cache still has it."""
    label = float_label(recipe) if has_integers(recipe) else None
    run = run_of(model) if label else None
    return outputs_of(run).get(label) if run and label else None


def _differences(found: Artifact, floats: Path, seconds: float, progress: Progress) -> list[OperatorDifference]:
    """One graph against its float graph after the other. Raises `InputError` for a model of another number of them."""
    quiet_libraries()
    graphs, float_graphs = find_graphs(found.folder), find_graphs(floats)
    if len(graphs) != len(float_graphs):
        raise InputError(
            f"The float model has {len(float_graphs)} graphs, and the model has {len(graphs)}.",
            where=str(floats),
            expected=f"float graphs of {', '.join(graph.name for graph in graphs)}",
        )
    asked = found.recipe
    pairs = zip(float_graphs, graphs, _calls(found, progress), strict=True)
    threads, share = asked.benchmark.threads, seconds / len(graphs)
    return [
        compare_operators(before, after, calls, TARGETS["cpu"], threads, share, progress, asked.seed)
        for before, after, calls in pairs
    ]


def _calls(found: Artifact, progress: Progress) -> Sequence[Calls]:
    """What each graph is called with, one example at a time; a decoder is asked once for the prompt, and for tokens."""
    calls = batch_calls(found.examples(progress), 1, found.recipe.seed)
    if len(find_graphs(found.folder)) == 1:
        return [calls]
    recordings = calls.batches[:_RECORDINGS]
    return [Calls(tuple(each)) for each in transcription_calls(found.folder, recordings, CALLS // _RECORDINGS)]


def _named(difference: OperatorDifference, several: bool) -> Iterator[Finding]:
    for finding in _findings(difference):
        name = Path(difference.int8_file).name
        yield replace(finding, what=f"{name}: {finding.what}") if several else finding


def _findings(difference: OperatorDifference) -> Iterator[Finding]:

    verdict = difference.verdict
    yield Finding("ok" if verdict == "faster" else "warning", verdict_text(difference))
    for cause in difference.responsible[:_NAMED] if verdict != "faster" else ():
        yield Finding("warning", cause_text(cause, difference), cause.help or None)
    slower = difference.slower_layers
    if verdict == "faster" and slower:
        names = ", ".join(layer.layer for layer in slower[:_NAMED])
        more = sum(layer.more_ms for layer in slower)
        yield Finding(
            "ok",
            f"{len(slower)} layers are slower than in float, by {more:.3g} ms together: {names}",
            slower[0].help or None,
        )
