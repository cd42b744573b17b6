"""Checks of `compress doctor MODEL`: operators that run on integers, and saturation on a target's processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.cli.output import Finding
from compress.formats.onnx.graph_reader import CONVOLUTIONS
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.model import find_graphs, graph_label
from compress.formats.quiet_output import quiet_libraries
from compress.formats.target_profile import Processor, find_processor
from compress.inspection.activation_clipping import Saturation, find_saturation, transcription_calls
from compress.inspection.integer_kernels import WeightedKernel, read_kernels
from compress.numerics.sampling import spread_sample
from compress.pipeline.artifact import find_artifact, has_recipe
from compress.report.run_folder import MODEL
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
        convolves = any(kernel.operator in CONVOLUTIONS for kernel in kernels)
        stage = "onnx_int8: {method: static}" if convolves else "onnx_int8"
        yield Finding("ok", "no operator of the model runs on 8-bit integers", f"the stage `{stage}` makes it smaller")
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
        yield Finding("ok", f"{processor.name}: none of {len(products)} products saturates measurably")
        return
    for product in saturating[:_NAMED]:
        description = (
            f"{product.cut:.2%} of its sums overflow on real inputs, its products have an error of {product.error:.1%}"
            if product.error is not None and product.cut is not None
            else f"{product.risk:.1%} of its weight pairs can overflow; name a recipe to measure how often they do"
        )
        yield Finding("warning", f"{processor.name}: {product.operator} {product.layer} saturates: {description}")
    yield Finding(
        "warning",
        f"{processor.name}: {len(saturating)} of {len(products)} products saturate in 16 bits; predictions will differ",
        "keep `reduce_range: auto` in the stage onnx_int8, or set `saturating`: weights that never saturate",
    )
