"""Checks of `compress doctor MODEL`: correctness on a target's processor, and speed against the float file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.benchmark.operator_difference import compare_operators
from compress.benchmark.profile import OperatorDifference
from compress.benchmark.profiled_calls import MAX_CALLS, ProfiledCalls, batch_calls
from compress.cli.artifact import Artifact, find_artifact, has_recipe, outputs_of, run_of
from compress.cli.output import Finding
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import find_graphs, graph_label
from compress.formats.quiet_output import quiet_libraries
from compress.formats.target_profile import Processor, find_processor
from compress.formats.targets import TARGETS
from compress.inspection.activation_clipping import Saturation, find_saturation, transcription_calls
from compress.inspection.integer_kernels import WeightedKernel, read_kernels
from compress.numerics.sampling import spread_sample
from compress.pipeline.warnings import float_label, has_integers
from compress.report.console import cause_text, verdict_text
from compress.report.run_folder import MODEL
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.utils.errors import InputError
from compress.utils.progress import Progress

_EXAMPLES = 32
_RECORDINGS, _CALLS = 4, 8
"""Number of recordings, which are long, and of calls of each of both graphs."""
_NAMED = 3


def model_findings(model: Path, target: str | None, recipe: Path | None, progress: Progress) -> Iterator[Finding]:
    """Yield findings on the graph in ``model``, or on each graph, prefixed with its file.

    Raises `InputError` and `ModelError` for files that cannot be read.
    """
    import onnx

    processor = find_processor(target or "cpu")
    folder, feeds = real_inputs(model, recipe, progress)
    graphs = find_graphs(folder)
    for index, graph in enumerate(graphs):
        findings = list(_kernels(read_kernels(graph)))
        # Without VNNI, pairs of 8-bit products are summed in 16 bits, which may saturate.
        if processor.sums_in_32_bits:
            message = f"{processor.name}: 8-bit products are summed in 32 bits, so none saturates"
            findings.append(Finding("ok", message))
        else:
            findings += _saturation(find_saturation(onnx.load(graph), feeds[index] if feeds else None), processor)
        for finding in findings:
            yield replace(finding, what=f"{graph_label(graph)}: {finding.what}") if len(graphs) > 1 else finding


def real_inputs(model: Path, recipe: Path | None, progress: Progress) -> tuple[Path, Sequence[Sequence[Feed]] | None]:
    """Return the model's folder or file, and inputs of each graph for a few test examples if there is a recipe."""
    if recipe is None and not has_recipe(model) and model.exists():
        return (model / MODEL if (model / MODEL).is_dir() else model), None

    quiet_libraries()
    artifact = find_artifact(model, recipe)
    examples = artifact.examples(progress)
    has_two_graphs = len(find_graphs(artifact.folder)) > 1
    # Recordings are long, so few of them are enough.
    sample = spread_sample(
        examples.lengths(), examples.classes, _RECORDINGS if has_two_graphs else _EXAMPLES, artifact.recipe.seed
    )
    batches = [examples.batch([int(index)]) for index in sample]
    return artifact.folder, transcription_calls(artifact.folder, batches, _CALLS) if has_two_graphs else [batches]


def _kernels(kernels: Sequence[WeightedKernel]) -> Iterator[Finding]:
    """Yield findings on operators that run on integers or in float."""
    integers = sum(kernel.integer for kernel in kernels)
    if not integers:
        yield Finding("ok", "no operator of the model runs on 8-bit integers", "a `onnx_int8` stage makes it smaller")
        return
    yield Finding("ok", f"{integers} of {len(kernels)} operators with weights run as 8-bit integer kernels")
    in_float = [kernel for kernel in kernels if not kernel.integer]
    # One finding per operator and reason.
    for operator, reason, helps in dict.fromkeys((kernel.operator, kernel.why, kernel.help) for kernel in in_float):
        names = [kernel.name for kernel in in_float if (kernel.operator, kernel.why) == (operator, reason)]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        shown = ", ".join(names[:_NAMED]) + more
        yield Finding("warning", f"{len(names)} {operator} in float ({shown}): {reason}", helps)


def _saturation(products: Sequence[Saturation], processor: Processor) -> Iterator[Finding]:
    """Yield findings on 8-bit products that saturate on a processor."""
    if not products:
        yield Finding("ok", f"{processor.name}: no product of unsigned by signed bytes, so none saturates")
        return
    saturating = [product for product in products if product.matters]
    saturating.sort(key=lambda product: -(product.error or product.risk))
    if not saturating:
        yield Finding("ok", f"{processor.name}: none of {len(products)} products saturates noticeably")
        return
    for product in saturating[:_NAMED]:
        description = (
            f"{product.cut:.2%} of its sums are cut off on real inputs, its products are off by {product.error:.1%}"
            if product.error is not None and product.cut is not None
            else f"{product.risk:.1%} of its weight pairs can be cut off; name a recipe to know how often they are"
        )
        yield Finding("warning", f"{processor.name}: {product.operator} {product.layer} saturates: {description}")
    yield Finding(
        "warning",
        f"{processor.name}: {len(saturating)} of {len(products)} products saturate in 16 bits; predictions will differ",
        "leave `reduce_range: auto` to the quantize stage there, or set `saturating`: weights that never saturate",
    )


_TIMED_RECORDINGS = 2
"""Recordings for models of two graphs: each has a prompt, which the decoder reads once, and tokens."""


def speed_findings(
    model: Path, recipe: Path | None, against: Path | None, seconds: float, progress: Progress
) -> tuple[list[Finding], list[OperatorDifference]]:
    """Time a quantized model against its float file.

    Args:
        model: Run folder or ONNX model.
        recipe: Recipe with real inputs.
        against: Float file, or None for the run's.
        seconds: Time budget.
        progress: Progress display.

    Returns:
        Findings, and a record for each graph; both are empty if there is no float file.

    Raises:
        InputError: If a named float file cannot be compared.
    """
    # A model file without a recipe has no real inputs, so nothing is timed.
    if against is None and recipe is None and not has_recipe(model):
        return [], []
    artifact = find_artifact(model, recipe)
    floats = against
    if floats is None:
        # The float file that a run quantized is still in its cache, unless that was pruned.
        label = float_label(artifact.recipe) if has_integers(artifact.recipe) else None
        run = run_of(model) if label else None
        floats = outputs_of(run).get(label) if run and label else None
    if floats is None:
        return [Finding("ok", "its float file is not in the cache, so nothing was timed", "--against FLOAT")], []
    if GENERATES in artifact.task.capabilities or READS_ROWS not in artifact.task.capabilities:
        if against is None:
            return [], []
        raise InputError(
            f"Files of {artifact.task.name} are not compared operator by operator.",
            where="--against",
            hint="`compress profile` of each file, and `compress compare A B --now` for their speed",
        )
    differences = _differences(artifact, floats, seconds, progress)
    findings = []
    for difference in differences:
        # Several graphs are told apart by their files.
        prefix = f"{graph_label(Path(difference.int8_file))}: " if len(differences) > 1 else ""
        findings += [replace(item, what=f"{prefix}{item.what}") for item in difference_findings(difference)]
    return findings, differences


def _differences(artifact: Artifact, floats: Path, seconds: float, progress: Progress) -> list[OperatorDifference]:
    """Compare each graph with its float graph. Raises `InputError` if their numbers differ.

    Args:
        artifact: The artifact.
        floats: Folder or file of the float graphs.
        seconds: Time budget.
        progress: Progress display.
    """
    quiet_libraries()
    graphs, float_graphs = find_graphs(artifact.folder), find_graphs(floats)
    if len(graphs) != len(float_graphs):
        raise InputError(
            f"The float model has {len(float_graphs)} graphs, and the model has {len(graphs)}.",
            where=str(floats),
            expected=f"float graphs of {', '.join(map(graph_label, graphs))}",
        )
    recipe = artifact.recipe
    # One example is a call; a decoder gets a prompt once, and then tokens.
    calls = [batch_calls(artifact.examples(progress), 1, recipe.seed)]
    if len(graphs) > 1:
        recordings = calls[0].batches[:_TIMED_RECORDINGS]
        batches_by_graph = transcription_calls(artifact.folder, recordings, MAX_CALLS // _TIMED_RECORDINGS)
        calls = [ProfiledCalls(tuple(batches)) for batches in batches_by_graph]
    threads, share = recipe.benchmark.threads, seconds / len(graphs)
    return [
        compare_operators(float_graph, graph, inputs, TARGETS["cpu"], threads, share, progress, recipe.seed)
        for float_graph, graph, inputs in zip(float_graphs, graphs, calls, strict=True)
    ]


def difference_findings(difference: OperatorDifference) -> Iterator[Finding]:
    """Yield findings on the times of a graph and its float graph."""
    verdict = difference.verdict
    yield Finding("ok" if verdict == "faster" else "warning", verdict_text(difference))
    for cause in difference.responsible[:_NAMED] if verdict != "faster" else ():
        yield Finding("warning", cause_text(cause, difference), cause.help or None)
    slower = difference.slower_layers
    if verdict == "faster" and slower:
        names = ", ".join(layer.layer for layer in slower[:_NAMED])
        extra_ms = sum(layer.more_ms for layer in slower)
        yield Finding(
            "ok",
            f"{len(slower)} layers are slower than in float, by {extra_ms:.3g} ms together: {names}",
            slower[0].help or None,
        )
