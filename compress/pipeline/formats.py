"""Outputs of a run in the format of a target: as they are, converted, or written from the weights before them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from compress.formats.registry import FORMATS
from compress.models.json_file import read_json
from compress.models.processor import PREPROCESSOR
from compress.models.torch_model import TorchModel
from compress.pipeline.format_support import FLOAT, asked_bits, format_given, leads_to
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import START
from compress.results.report import BASELINE, FINAL
from compress.stages.base import Context, OutputSpec, Stage
from compress.stages.protocols import RoundsWeights
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT
from compress.tasks.registry import infer_task
from compress.utils.installation import has_package

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
    """Return the label of an output in a format, and write it if it is missing.

    Args:
        runner: Results of the stages.
        label: Label of the output.
        form: Name of the format.
        options: Fields of the stage that writes the format.
    """
    spec, current_format = FORMATS[form], _format(runner, label)
    if spec.written_by is None:
        return _whole(runner, weights_of(runner, label))
    if current_format == form:
        return label
    if spec.written_from is None:
        source = weights_of(runner, label)
    else:
        source = label if spec.written_from == current_format else _in_format(runner, label, spec.written_from, {})
    written_label = f"{label}, as {form.upper()}"
    runner.run_extra(written_label, _writer(runner, label, form, options), source)
    return written_label


def _whole(runner: StageRunner, label: str) -> str:
    """Return ``label``, or the starting model with a new head if it lacks the task's head or class names."""
    if label != START or EXPORTED_FROM_CHECKPOINT in runner.inputs.task.capabilities:
        return label
    config = read_json(runner.inputs.start / "config.json")
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
    kind: Literal["with_head"] = "with_head"

    def output_spec(self) -> OutputSpec:
        """Not one weight."""
        return OutputSpec(changes_weights=False)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model


def _writer(runner: StageRunner, label: str, form: str, options: Options) -> Stage[Any, Any]:
    """Return the stage that writes an output in a format, with the recipe's settings if it has that stage.

    Args:
        runner: Results of the stages.
        label: Label of the output.
        form: Name of the format.
        options: Fields of the stage, beside its defaults.
    """
    kind = FORMATS[form].written_by
    assert kind is not None, "what no stage writes is there already"
    if FORMATS[form].own_bits:
        precision_fields = asked_bits(runner.recipe, label, kind)
        fields = options if precision_fields["precision"] != FLOAT or label == runner.recipe.labels()[-1] else {}
        # A precision that the recipe gives is not for the bits that it gives to ONNX.
        # The precision that the recipe asks for here replaces the one that it uses for ONNX.
        return STAGES[kind].model_validate(
            {"kind": kind, **({} if "precision" in fields else precision_fields), **fields}
        )
    default = STAGES[kind].model_validate({"kind": kind, **options})
    written = next((stage for stage in runner.recipe.stages if stage.kind == kind), default)
    return written.without_rounding() if isinstance(written, RoundsWeights) else written
