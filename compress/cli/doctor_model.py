"""`compress doctor MODEL`: will this file be right on a target's processor, and faster than its float file?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.benchmark.operator_difference import compare_operators
from compress.benchmark.profile import OperatorDifference
from compress.benchmark.profiled_calls import MAX_CALLS, ProfiledCalls, batch_calls
from compress.cli.artifact import Artifact, find_artifact, has_recipe
from compress.cli.output import Finding
from compress.cli.run_outputs import outputs_of, run_of
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import find_graphs, graph_label
from compress.formats.silence import quiet_libraries
from compress.formats.target_profile import Processor, find_processor
from compress.formats.targets import TARGETS
from compress.inspection.integer_kernels import Kernel, read_kernels
from compress.inspection.saturation import Saturation, find_saturation
from compress.inspection.transcription_calls import transcription_calls
from compress.numerics.sampling import spread_sample
from compress.pipeline.warnings import float_label, has_integers
from compress.recipe.recipe import Recipe
from compress.report.difference_console import cause_text, verdict_text
from compress.report.run_folder import MODEL
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.utils.errors import InputError
from compress.utils.progress import Progress

_EXAMPLES = 32
_RECORDINGS, _CALLS = 4, 8
"""Of recordings, which are long: how many, and how often each of both graphs is asked."""
_NAMED = 3


def model_findings(model: Path, target: str | None, recipe: Path | None, progress: Progress) -> Iterator[Finding]:
    """What to know of the graph in ``model``, or of both in turn; then each finding begins with the graph's file.

    Raises `InputError` and `ModelError` for what can't be read.
    """
    processor = find_processor(target or "cpu")
    folder, feeds = real_inputs(model, recipe, progress)
    graphs = find_graphs(folder)
    for place, graph in enumerate(graphs):
        for finding in _of_graph(graph, feeds[place] if feeds else None, processor):
            yield replace(finding, what=f"{graph_label(graph)}: {finding.what}") if len(graphs) > 1 else finding


def _of_graph(graph: Path, feeds: Sequence[Feed] | None, processor: Processor) -> Iterator[Finding]:
    import onnx

    yield from _kernels(read_kernels(graph))
    if processor.sums_in_32_bits:
        yield Finding("ok", f"{processor.name}: 8-bit products are summed in 32 bits, so none saturates")
        return
    yield from _saturation(find_saturation(onnx.load(graph), feeds), processor)


def real_inputs(model: Path, recipe: Path | None, progress: Progress) -> tuple[Path, Sequence[Sequence[Feed]] | None]:
    """The model's folder or file, and what each graph is asked for a few test examples if a recipe says how."""
    if recipe is None and not has_recipe(model) and model.exists():
        return (model / MODEL if (model / MODEL).is_dir() else model), None

    quiet_libraries()
    found = find_artifact(model, recipe)
    examples = found.examples(progress)
    several = len(find_graphs(found.folder)) > 1
    chosen = spread_sample(
        examples.lengths(), examples.classes, _RECORDINGS if several else _EXAMPLES, found.recipe.seed
    )
    batches = [examples.batch([int(place)]) for place in chosen]
    return found.folder, transcription_calls(found.folder, batches, _CALLS) if several else [batches]


def _kernels(kernels: Sequence[Kernel]) -> Iterator[Finding]:
    integers = sum(kernel.integer for kernel in kernels)
    if not integers:
        yield Finding("ok", "no operator of the model runs on 8-bit integers", "a `quantize` stage makes it smaller")
        return
    yield Finding("ok", f"{integers} of {len(kernels)} operators with weights run as 8-bit integer kernels")
    slow = [kernel for kernel in kernels if not kernel.integer]
    for operator, why, helps in dict.fromkeys((kernel.operator, kernel.why, kernel.help) for kernel in slow):
        names = [kernel.name for kernel in slow if (kernel.operator, kernel.why) == (operator, why)]
        yield Finding("warning", f"{len(names)} {operator} in float ({_some(names)}): {why}", helps)


def _saturation(found: Sequence[Saturation], processor: Processor) -> Iterator[Finding]:
    if not found:
        yield Finding("ok", f"{processor.name}: no product of unsigned by signed bytes, so none saturates")
        return
    bad = sorted((each for each in found if each.matters), key=lambda each: -(each.error or each.risk))
    if not bad:
        yield Finding("ok", f"{processor.name}: none of {len(found)} products saturates noticeably")
        return
    for each in bad[:_NAMED]:
        seen = (
            f"{each.cut:.2%} of its sums are cut off on real inputs, its products are off by {each.error:.1%}"
            if each.error is not None and each.cut is not None
            else f"{each.risk:.1%} of its weight pairs can be cut off; name a recipe to know how often they are"
        )
        yield Finding("warning", f"{processor.name}: {each.operator} {each.layer} saturates: {seen}")
    yield Finding(
        "warning",
        f"{processor.name}: {len(bad)} of {len(found)} products saturate in 16 bits; answers will differ from here",
        "leave `reduce_range: auto` to the quantize stage there, or set `saturating`: weights that never saturate",
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


_TIMED_RECORDINGS = 2
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
            hint="`compress profile` of each file, and `compress compare A B --now` for their speed",
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
            expected=f"float graphs of {', '.join(map(graph_label, graphs))}",
        )
    asked = found.recipe
    pairs = zip(float_graphs, graphs, _calls(found, progress), strict=True)
    threads, share = asked.benchmark.threads, seconds / len(graphs)
    return [
        compare_operators(before, after, calls, TARGETS["cpu"], threads, share, progress, asked.seed)
        for before, after, calls in pairs
    ]


def _calls(found: Artifact, progress: Progress) -> Sequence[ProfiledCalls]:
    """What each graph is called with, one example at a time; a decoder is asked once for the prompt, and for tokens."""
    calls = batch_calls(found.examples(progress), 1, found.recipe.seed)
    if len(find_graphs(found.folder)) == 1:
        return [calls]
    recordings = calls.batches[:_TIMED_RECORDINGS]
    return [
        ProfiledCalls(tuple(each))
        for each in transcription_calls(found.folder, recordings, MAX_CALLS // _TIMED_RECORDINGS)
    ]


def _named(difference: OperatorDifference, several: bool) -> Iterator[Finding]:
    for finding in _findings(difference):
        name = graph_label(Path(difference.int8_file))
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
