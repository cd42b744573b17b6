"""Outputs of a run in the format of a target: as they are, converted, or written from the weights before them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from compress.formats.model_file import check_writable
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS, RUNTIMES
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.models.model import TorchModel
from compress.models.processor import PREPROCESSOR
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import START, Recipe
from compress.results.report import BASELINE, FINAL
from compress.stages.base import AnyStage, Context, OutputSpec, Stage
from compress.stages.protocols import RoundsWeights, SetsPrecision, starts_from
from compress.stages.registry import STAGES
from compress.tasks.capability import (
    DESCRIBES_IMAGES,
    EXPORTED_FROM_CHECKPOINT,
    GENERATES,
    GENERATES_IMAGES,
    SINGLE_CALL,
)
from compress.tasks.registry import TASKS, infer_task, tasks_with
from compress.utils.environment import has_package
from compress.utils.errors import ModelError

FLOAT = "fp32"
_ANY_ARCHITECTURE = frozenset({GENERATES, DESCRIBES_IMAGES})
"""Tasks whose models have many architectures, so that each model is checked before any work."""


def unsupported_reason(recipe: Recipe, start: Path | None, target: Target, from_graph: bool) -> str | None:
    """Return why the final model or the baseline cannot run on a target, or None if both can.

    Args:
        recipe: The recipe.
        start: Folder of the starting model, or None to skip checks of its architecture.
        target: The target.
        from_graph: True if the starting model is an ONNX file.
    """
    task, config = TASKS[recipe.task], None if start is None else start / "config.json"
    capabilities = (task.specialize(read_json(config)) if config and config.is_file() else task).capabilities
    form, runtime = target.format, RUNTIMES[target.runtime]
    spec, files = FORMATS[form], f"it runs {target.format.upper()} files"
    if runtime.one_batch_at_a_time and not {SINGLE_CALL, GENERATES_IMAGES} & capabilities:
        return f"it runs one batch per call, and {recipe.task} generates token by token"
    if spec.written_by is None:  # what outputs are before they are in a format, the starting model at least
        return "it runs checkpoints of transformers, not ONNX graphs" if from_graph else None
    # Both models that are compared must exist in the target's format.
    for label in (recipe.labels()[-1], recipe.baseline):
        if (reason := _unwritable_reason(recipe, label, form, from_graph)) is not None:
            return f"{files}, {reason}"
    if from_graph and spec.own_bits and not starts_from(STAGES[spec.written_by], OnnxModel):
        return f"{files}, which the stage {spec.written_by} does not write from an ONNX graph"
    if runtime.generates_only and GENERATES not in capabilities:
        return f"{target.runtime} runs {', '.join(tasks_with(frozenset({GENERATES})))} only"
    if not STAGES[spec.written_by].supports(capabilities):
        return f"{files}, which the stage {spec.written_by} does not write for {recipe.task}"
    # The exporters of these tasks support some architectures only, so ask them.
    if _ANY_ARCHITECTURE & capabilities and start is not None:
        try:
            check_writable(start, form)
        except ModelError as error:
            return f"{files}. {error.what}"
    return None


def _unwritable_reason(recipe: Recipe, label: str, form: str, from_graph: bool) -> str | None:
    """Return why an output cannot be written in a format, or None if it can.

    Args:
        recipe: The recipe.
        label: Label of the output.
        form: Name of the format.
        from_graph: True if the starting model is an ONNX file.
    """
    spec, output_format = FORMATS[form], format_given(recipe, label, from_graph)
    if not spec.own_bits:
        return None if leads_to(output_format, form) else f"and {label} gives {str(output_format).upper()}"
    assert spec.written_by is not None, "a stage writes every format with its own precisions"
    precision = requested_precision(recipe, label, spec.written_by)["precision"]
    if precision in get_args(STAGES[spec.written_by].model_fields["precision"].annotation):
        return None
    return f"which the stage {spec.written_by} does not write in {precision}"


def check_formats(recipe: Recipe, start: Path) -> None:
    """Check that the recipe's format stages support the model's architecture, before any other stage runs.

    Raises `ModelError`.
    """
    formats_by_stage = {spec.written_by: form for form, spec in FORMATS.items() if spec.written_by}
    for stage in recipe.stages if _ANY_ARCHITECTURE & TASKS[recipe.task].capabilities else ():
        if stage.kind in formats_by_stage:
            check_writable(start, formats_by_stage[stage.kind])


def format_given(recipe: Recipe, label: str, from_graph: bool) -> str | None:
    """Return the format of a stage's output, or None for a model that any format can be written from."""
    if label == START:
        return OnnxModel.kind if from_graph else None
    kind = getattr(recipe.stages[recipe.labels().index(label)].output_type, "kind", None)
    return kind if kind in FORMATS else None


def leads_to(found: str | None, form: str) -> bool:
    """Return True if one format can be written from another one, or from None."""
    while True:
        if found in (None, form):
            return True
        # Some formats are converted from another one, such as ORT from ONNX. Follow the chain backwards.
        source = FORMATS[form].written_from
        if source is None:
            return False
        form = source


def requested_precision(recipe: Recipe, label: str, kind: str) -> dict[str, Any]:
    """Return the precision that the recipe's ONNX stages up to ``label`` give the weights, as fields of stage ``kind``.

    If there are several, the last one with the fewest bits counts.
    """
    labels = recipe.labels()
    stages = recipe.stages[: labels.index(label) + 1] if label != START else ()
    precisions = [stage.precision_settings() for stage in reversed(stages) if isinstance(stage, SetsPrecision)]
    lowest = min(precisions, key=lambda found: int(found["precision"].strip("fpint")), default={"precision": FLOAT})
    fields = STAGES[kind].model_fields
    return {name: value for name, value in lowest.items() if name in fields}


Options = Mapping[str, Any]
"""Fields of the stage that writes a format, beside its defaults."""


def measurable(runner: StageRunner, form: str, options: Options = MappingProxyType({})) -> dict[str, Path]:
    """Return the folder of an artifact in a format by label: `baseline`, each stage that can be written so, `final`.

    For a format with its own precisions, ``options`` apply to compressed models and the final one only. If no stage
    writes the format, `final` is the weights that the final model was written from. Raises `StageError` if an output
    cannot be exported.
    """
    labels = runner.recipe.labels()
    selected = [label for label in labels if leads_to(_format(runner, label), form)]
    # A format with its own precisions is written from the float weights if the final model is in no such format.
    if FORMATS[form].own_bits and labels[-1] not in selected:
        selected.append(labels[-1])
    selected = selected if runner.recipe.benchmark.every_stage else selected[-1:]
    artifacts = {BASELINE: written(runner, runner.recipe.baseline, form, options)}
    artifacts |= {label: written(runner, label, form, options) for label in selected if label != runner.recipe.baseline}
    last = artifacts[BASELINE] if labels[-1] == runner.recipe.baseline else artifacts.get(labels[-1])
    return {**artifacts, FINAL: last or written(runner, labels[-1], form, options)}


def can_write(form: str) -> bool:
    """Return True if the packages that write a format are installed."""
    sources = (form, FORMATS[form].written_from)
    kinds = [kind for source in sources if source is not None and (kind := FORMATS[source].written_by) is not None]
    packages = {package for kind in kinds for package in STAGES[kind].model_validate({"kind": kind}).called_packages()}
    return all(has_package(package) for package in packages)


def weights_of(runner: StageRunner, label: str) -> str:
    """Return the label of the last output up to ``label`` that is in no format yet, or else the starting graph."""
    labels = [START, *runner.recipe.labels()]
    candidates = (name for name in reversed(labels[: labels.index(label) + 1]) if _format(runner, name) is None)
    return next(candidates, START)


def _format(runner: StageRunner, label: str) -> str | None:
    """Return the format of an output, or None if any format can be written from it."""
    return format_given(runner.recipe, label, runner.inputs.from_graph)


def written(runner: StageRunner, label: str, form: str, options: Options) -> Path:
    """Return the folder of an output, or of the starting model, in a format. Raises as `measurable`.

    Args:
        runner: Results of the stages.
        label: Label of the output.
        form: Name of the format.
        options: Fields of the stage that writes the format.
    """
    return runner.folder_of(_in_format(runner, label, form, options))


def _in_format(runner: StageRunner, label: str, form: str, options: Options) -> str:
    """Return the label of an output in a format, and write it if it is missing."""
    spec, current_format = FORMATS[form], _format(runner, label)
    if spec.written_by is None:
        return _whole(runner, weights_of(runner, label))
    if current_format == form:
        return label
    if spec.written_from is None:
        source = weights_of(runner, label)
    else:
        source = label if spec.written_from == current_format else _in_format(runner, label, spec.written_from, {})
    # The label tells readers of the report which format the file is in.
    written_label = f"{label}, as {form.upper()}"
    runner.run_extra(written_label, _writer(runner, label, form, options), source)
    return written_label


def _whole(runner: StageRunner, label: str) -> str:
    """Return ``label``, or the starting model with a new head if it lacks the task's head or class names."""
    if label != START or EXPORTED_FROM_CHECKPOINT in runner.inputs.task.capabilities:
        return label
    config = read_json(runner.inputs.start / "config.json")
    # The config says which head the checkpoint has. A missing head gets seeded random weights.
    inferred_task = infer_task(config, (runner.inputs.start / PREPROCESSOR).is_file())
    if inferred_task == runner.recipe.task and set(runner.inputs.data.labels) <= set(
        (config.get("id2label") or {}).values()
    ):
        return label
    written_label = f"{START}, with its head"
    runner.run_extra(written_label, WithHead(kind="with_head"), START)
    return written_label


class WithHead(Stage[TorchModel, TorchModel]):
    """Stage that stores the starting model as the task loads it, so that other formats can be written from it.

    It is not part of any recipe.
    """

    packages = ("torch", "transformers")
    guarantees = OutputSpec(changes_weights=False)
    kind: Literal["with_head"] = "with_head"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model


def _writer(runner: StageRunner, label: str, form: str, options: Options) -> AnyStage:
    """Return the stage that writes an output in a format, with the recipe's settings if it has that stage.

    Args:
        runner: Results of the stages.
        label: Label of the output.
        form: Name of the format.
        options: Fields of the stage, beside its defaults.
    """
    kind = FORMATS[form].written_by
    assert kind is not None, "a format that no stage writes must already exist"
    if FORMATS[form].own_bits:
        precision_fields = requested_precision(runner.recipe, label, kind)
        fields = options if precision_fields["precision"] != FLOAT or label == runner.recipe.labels()[-1] else {}
        # The precision that the recipe asks for here replaces the one that it uses for ONNX.
        return STAGES[kind].model_validate(
            {"kind": kind, **({} if "precision" in fields else precision_fields), **fields}
        )
    default = STAGES[kind].model_validate({"kind": kind, **options})
    written = next((stage for stage in runner.recipe.stages if stage.kind == kind), default)
    return written.without_rounding() if isinstance(written, RoundsWeights) else written
