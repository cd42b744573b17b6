"""`compress doctor MODEL`: will this file be right and fast on a target's processor?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.cli.artifact import MODEL, find_artifact, has_recipe
from compress.cli.output import Finding
from compress.formats.onnx.int8.observe import Feed
from compress.formats.onnx.model import find_graphs
from compress.formats.silence import quiet_libraries
from compress.inspect.integer_kernels import Kernel, read_kernels
from compress.inspect.saturation import Saturation, find_saturation
from compress.inspect.transcription_calls import transcription_calls
from compress.numerics.sampling import spread_sample
from compress.progress import Progress
from compress.targets import Processor, find_processor

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
            yield replace(finding, what=f"{graph.name}: {finding.what}") if len(graphs) > 1 else finding


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
