"""Every output of a runner in the format of a target: as it is, written from it, or from what it was made of."""

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
from compress.stages.registry import STAGES
from compress.tasks.capability import IS_WRITTEN
from compress.tasks.registry import told_task
from compress.utils.installation import has_package

Options = Mapping[str, Any]
"""Fields of the stage that writes a format, beside its defaults."""


def measurable(runner: StageRunner, form: str, options: Options = MappingProxyType({})) -> dict[str, Path]:
    """Label -> folder of an artifact of that format: `baseline`, each stage that can be written so, `final`.

    In a format of own bits ``options`` are for what the recipe made smaller, and for the final model: the others stay
    what it is compared with. Where no stage writes the format, `final` is the weights that the final model was made
    of. Raises `StageError` where an output cannot be exported.
    """
    labels = runner.recipe.labels()
    wanted = [label for label in labels if leads_to(_format(runner, label), form)]
    if FORMATS[form].own_bits and labels[-1] not in wanted:
        wanted.append(labels[-1])
    wanted = wanted if runner.recipe.benchmark.every_stage else wanted[-1:]
    artifacts = {BASELINE: written(runner, runner.recipe.baseline, form, options)}
    artifacts |= {label: written(runner, label, form, options) for label in wanted if label != runner.recipe.baseline}
    last = artifacts[BASELINE] if labels[-1] == runner.recipe.baseline else artifacts.get(labels[-1])
    return {**artifacts, FINAL: last or written(runner, labels[-1], form, options)}


def can_write(form: str) -> bool:
    """Whether the packages are installed that write a format."""
    sources = (form, FORMATS[form].written_from)
    kinds = [kind for source in sources if source is not None and (kind := FORMATS[source].written_by) is not None]
    packages = {package for kind in kinds for package in STAGES[kind].model_validate({"kind": kind}).called_packages()}
    return all(has_package(package) for package in packages)


def weights_of(runner: StageRunner, label: str) -> str:
    """The last output up to ``label`` that is in no format yet, or else the graph that the recipe starts from."""
    labels = [START, *runner.recipe.labels()]
    found = (one for one in reversed(labels[: labels.index(label) + 1]) if _format(runner, one) is None)
    return next(found, START)


def _format(runner: StageRunner, label: str) -> str | None:
    return format_given(runner.recipe, label, runner.inputs.from_graph)


def written(runner: StageRunner, label: str, form: str, options: Options) -> Path:
    """One output of a runner in a format, the starting model's too. Raises as `measurable`."""
    return runner.folder_of(_in_format(runner, label, form, options))


def _in_format(runner: StageRunner, label: str, form: str, options: Options) -> str:
    """The label under which an output is to be had in a format, written now unless it was before."""
    spec, found = FORMATS[form], _format(runner, label)
    if spec.written_by is None:
        return _whole(runner, weights_of(runner, label))
    if found == form:
        return label
    if spec.written_from is None:
        before = weights_of(runner, label)
    else:
        before = label if spec.written_from == found else _in_format(runner, label, spec.written_from, {})
    written = f"{label}, as {form.upper()}"
    runner.run_extra(written, _writer(runner, label, form, options), before)
    return written


def _whole(runner: StageRunner, label: str) -> str:
    """``label``, or for a starting model that lacks the task's head or its class names, one with both."""
    if label != START or IS_WRITTEN in runner.inputs.task.capabilities:
        return label
    config = read_json(runner.inputs.start / "config.json")
    told = told_task(config, (runner.inputs.start / PREPROCESSOR).is_file())
    if told == runner.recipe.task and set(runner.inputs.data.labels) <= set((config.get("id2label") or {}).values()):
        return label
    written = f"{START}, with its head"
    runner.run_extra(written, WithHead(kind="with_head"), START)
    return written


class WithHead(Stage[TorchModel, TorchModel]):
    """The starting model as the task loads it. No recipe names this: other formats are written from it as it is."""

    packages = ("torch", "transformers")
    kind: Literal["with_head"] = "with_head"

    def output_spec(self) -> OutputSpec:
        """Not one weight."""
        return OutputSpec(changes_weights=False)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """The model itself."""
        return model


def _writer(runner: StageRunner, label: str, form: str, options: Options) -> Stage[Any, Any]:
    """The stage that writes an output in a format: of so many bits, or as the recipe has it, or by default."""
    kind = FORMATS[form].written_by
    assert kind is not None, "what no stage writes is there already"
    if FORMATS[form].own_bits:
        bits = asked_bits(runner.recipe, label, kind)
        chosen = options if bits["precision"] != FLOAT or label == runner.recipe.labels()[-1] else {}
        # A precision that the recipe gives is not for the bits that it gives to ONNX.
        return STAGES[kind].model_validate({"kind": kind, **({} if "precision" in chosen else bits), **chosen})
    default = STAGES[kind].model_validate({"kind": kind, **options})
    return next((stage.without_rounding() for stage in runner.recipe.stages if stage.kind == kind), default)
