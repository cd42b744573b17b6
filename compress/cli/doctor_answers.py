"""Check `compress doctor MODEL --target TARGET`: layers whose values differ from the float reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.output import Finding
from compress.formats.model_file import format_of, model_file, model_files
from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.intermediate_values import Values
from compress.formats.onnx.model import OnnxModel
from compress.formats.quiet_output import quiet_libraries
from compress.formats.registry import FORMATS
from compress.formats.runtime import prepare_runtime
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS
from compress.inspection.layer_comparison import (
    Departure,
    FormatComparison,
    compare_parts,
    gives_values,
    open_value_graph,
)
from compress.inspection.layers import node_modules
from compress.numerics.sampling import spread_sample
from compress.pipeline.artifact import Artifact, final_for, find_artifact, outputs_of, run_of
from compress.pipeline.warnings import float_label
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.tasks.task import Examples
from compress.utils.errors import InputError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import onnx


_EXAMPLES = 8


@dataclass(frozen=True)
class _Reference:
    """Float graph with the layer of each node by name, and its description."""

    graph: onnx.ModelProto
    layers: dict[str, str]
    name: str


def answer_findings(
    model: Path, target: Target, recipe: Path | None, against: Path | None, progress: Progress
) -> tuple[list[Finding], FormatComparison | None]:
    """Compare the values of a target's file and its float reference.

    Args:
        model: Run folder or model file.
        target: The target.
        recipe: Recipe with real inputs.
        against: Float file, or None for the run's.
        progress: Progress display.

    Returns:
        Findings and the record, or None if the target is not available here.

    Raises:
        InputError: If there is no file for the target, or no reference.
    """
    if not gives_values(target):
        raise InputError(
            f"Intermediate values of a file are not available on the target {target.name!r}.",
            where="--target",
            expected=f"one of {', '.join(name for name, candidate in TARGETS.items() if gives_values(candidate))}",
        )
    reason = prepare_runtime(target, progress)
    if reason is not None:
        return [Finding("ok", f"{target.name}: its outputs were not compared: {reason}")], None
    quiet_libraries()
    artifact = find_artifact(model, recipe)
    if (
        GENERATES in artifact.task.capabilities
        or READS_ROWS not in artifact.task.capabilities
        or len(model_files(artifact.folder)) > 1
    ):
        raise InputError(f"Files of {artifact.task.name} are not compared value by value.", where="--target")
    file = _file_for(model, artifact, target, progress)
    examples = artifact.examples(progress, file)
    reference = _reference(model, artifact, target, against, examples, progress)
    # A few examples of different lengths and classes are enough to locate a wrong layer.
    sample = spread_sample(examples.lengths(), examples.classes, _EXAMPLES, artifact.recipe.seed)
    batches: list[Values] = [examples.batch([int(index)]) for index in sample]
    parts = open_value_graph(file, target)
    comparison = compare_parts(reference.graph, reference.layers, parts, batches, progress)
    if comparison is None:
        raise InputError(
            f"{reference.name} and the file for {target.name} have no tensor name in common.",
            where=str(file),
            expected="two files of one model from the same export",
            hint="give the float file that it was written from with --against",
        )
    return list(_findings(comparison, target, reference.name)), comparison


def _file_for(model: Path, artifact: Artifact, target: Target, progress: Progress) -> Path:
    """Return the artifact itself, or its run's file for the target.

    Args:
        model: Run folder or model file.
        artifact: The artifact.
        target: The target.
        progress: Progress display.
    """
    form = format_of(artifact.folder)
    if form == target.format:
        return artifact.folder
    run = run_of(model)
    if run is None:
        raise InputError(
            f"This is a file in the format {form}, and {target.name} opens {target.format}.",
            where=str(artifact.folder),
            hint=f"give the file for {target.name}, or a run's folder, whose cache contains it",
        )
    progress.note(f"using the run's model for {target.name} from its cache")
    return final_for(run, artifact.recipe, target, progress)


def _reference(
    model: Path, artifact: Artifact, target: Target, against: Path | None, examples: Examples, progress: Progress
) -> _Reference:
    """Return the float file that was named, or the run's export, or its weights for formats written from weights.

    Args:
        model: Run folder or model file.
        artifact: The artifact.
        target: The target.
        against: Float file, or None for the run's.
        examples: Inputs for an export.
        progress: Progress display.
    """
    import onnx

    run = run_of(model)
    path = against
    if path is None and run is not None:
        outputs = outputs_of(run)
        path = outputs.get(float_label(artifact.recipe) or "")
        # Formats with their own quantization are written from the weights, and others from the exported graph.
        if path is None or FORMATS[target.format].own_bits:
            weights = [folder for folder in outputs.values() if any(folder.glob("*.safetensors"))]
            path = weights[-1] if weights else None
    if path is None:
        raise InputError(
            "There is no reference to compare the file with.",
            where=str(model),
            hint="give its float file, or the folder of its weights, with --against",
        )
    if not (path.is_dir() and any(path.glob("*.safetensors"))):
        if format_of(path) != OnnxModel.kind:
            raise InputError(
                "The reference is not an ONNX file.", where=str(path), expected="an .onnx file, or a folder of weights"
            )
        graph = model_file(path)
        return _Reference(onnx.load(graph), node_modules(graph), f"the float file {graph.name}")
    from compress.models.model import TorchModel

    progress.note("exporting the float weights as the reference")
    # Without fusions, the graph has a value for each layer.
    exported = export_onnx(TorchModel.load(path, artifact.task), examples, opset=None, fusions=False).graph
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        onnx.save(exported, graph)
        return _Reference(exported, node_modules(graph), "the float weights")


def _findings(compared: FormatComparison, target: Target, reference: str) -> Iterator[Finding]:
    """Yield the findings of a comparison."""
    bad = compared.departures
    if not bad:
        worst = compared.worst
        yield Finding(
            "ok",
            f"{target.name}: none of {compared.parts} parts deviates from {reference}; {_part(worst)} has "
            f"the largest own error, {worst.error:.2g} of the value's spread{_explained(worst)}",
        )
    else:
        # The finding on the first layer that departs from the reference.
        first = bad[0]
        others = ", ".join(dict.fromkeys(departure.layer or departure.name for departure in bad[1:]))
        suffix = f"; so do {len(bad)} of {compared.parts}, also in {others}" if others else ""
        rewrite = "write the file again; if that changes nothing, the runtime computes this operator differently"
        if first.bits >= 32:
            advice = f"its weights or attributes differ from the reference: {rewrite}"
        elif not FORMATS[target.format].own_bits and first.weights:
            advice = (
                f"`onnx_int8: {{keep: [{first.weights}]}}` keeps it in float; if the method is static, try another "
                f"calibration_method; or its integers differ from the reference: {rewrite}"
            )
        else:
            advice = f"more bits for the weights (`precision`); or its values differ from the reference: {rewrite}"
        yield Finding(
            "warning",
            f"{target.name}: the first operator that deviates from {reference} is {_part(first)}: its own error "
            f"is {first.error:.2g} of the value's spread{_explained(first)}; in the running file the error "
            f"is {first.before:.2g} before it and {first.after:.2g} after it; alone it changes the outputs by "
            f"{first.alone:.2g} of their spread, the whole file by {compared.answers:.2g}{suffix}",
            advice,
        )
    share = f"{compared.answers:.2g} of their spread"
    yield Finding("ok", f"{target.name}: the outputs of {compared.examples} examples differ by {share} in total")


def _part(departure: Departure) -> str:
    """Return the operator, its name and its layer."""
    layer = f" in {departure.layer}" if departure.layer else ""
    return f"{departure.operator} {departure.name}{layer}"


def _explained(departure: Departure) -> str:
    """Return the part of an error that the number of bits explains."""
    return f", where {departure.bits} bits explain {departure.explained:.2g}" if departure.bits < 32 else ""
