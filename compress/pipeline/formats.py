"""Every output of a road in the format of a target: as it is, written from it, or from what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from compress.errors import ModelError
from compress.formats.model_file import check_writable
from compress.formats.registry import FORMATS, RUNTIMES
from compress.installation import has_package
from compress.pipeline.keys import START
from compress.pipeline.road import Road
from compress.report.schema import BASELINE, FINAL
from compress.stage.stage import Stage
from compress.stages import STAGES
from compress.targets import Target
from compress.tasks.capability import ANSWERS_AT_ONCE, GENERATES
from compress.tasks.registry import tasks_with

_FLOAT = "fp32"


Options = Mapping[str, Any]
"""Fields of the stage that writes a format, beside its defaults."""


def measurable(road: Road, form: str, options: Options = MappingProxyType({})) -> dict[str, Path]:
    """Label -> folder of an artifact of that format: `baseline`, each stage that can be written so, `final`.

    In a format of own bits ``options`` are for what the recipe made smaller, and for the final model: the others stay
    what it is compared with. Raises `StageError` where an output cannot be exported.
    """
    labels = road.recipe.labels()
    wanted = [label for label in labels if _leads_to(_format(road, label), form)]
    if FORMATS[form].own_bits and labels[-1] not in wanted:
        wanted.append(labels[-1])
    wanted = wanted if road.recipe.benchmark.every_stage else wanted[-1:]
    artifacts = {BASELINE: _written(road, road.recipe.baseline, form, options)}
    artifacts |= {label: _written(road, label, form, options) for label in wanted if label != road.recipe.baseline}
    return {**artifacts, FINAL: artifacts.get(labels[-1], artifacts[BASELINE])}


def why_not(road: Road, target: Target) -> str | None:
    """Why the final model, or the baseline, cannot run on a target: no file of that format is, or can be, written."""
    capabilities = road.task.capabilities
    form, task, runtime = target.format, road.recipe.task, RUNTIMES[target.runtime]
    spec, files = FORMATS[form], f"it runs {target.format.upper()} files"
    if runtime.one_batch_at_a_time and ANSWERS_AT_ONCE not in capabilities:
        return f"it answers one batch at a time, and {task} goes token by token"
    for label in (road.recipe.labels()[-1], road.recipe.baseline):
        found = _format(road, label)
        if found is not None and not _leads_to(found, form) and not spec.own_bits:
            return f"{files}, and {label} gives {found.upper()}"
        precision = _bits(road, label, spec.written_by)["precision"] if spec.own_bits else None
        known = STAGES[spec.written_by].model_fields
        if precision is not None and precision not in get_args(known["precision"].annotation):
            return f"{files}, which the stage {spec.written_by} does not write in {precision}"
    writer = STAGES[spec.written_by]
    if spec.own_bits and _format(road, START) not in (None, form) and not writer.starts_from_graph:
        return f"{files}, which the stage {spec.written_by} does not write from an ONNX graph"
    if runtime.generates_only and GENERATES not in capabilities:
        return f"{target.runtime} runs {', '.join(tasks_with(frozenset({GENERATES})))} only"
    if not STAGES[spec.written_by].is_for(capabilities):
        return f"{files}, which the stage {spec.written_by} does not write for {task}"
    if GENERATES in capabilities:
        try:
            check_writable(road.start, form)
        except ModelError as error:
            return f"{files}. {error.what}"
    return None


def can_write(form: str) -> bool:
    """Whether the packages are installed that write a format."""
    kinds = [FORMATS[form].written_by]
    if (source := FORMATS[form].written_from) is not None:
        kinds.append(FORMATS[source].written_by)
    packages = {package for kind in kinds for package in STAGES[kind].model_validate({"kind": kind}).calls()}
    return all(has_package(package) for package in packages)


def check_formats(road: Road) -> None:
    """Prove that the stages which write a language model can write the one that the recipe starts from.

    Raises `ModelError`, rather than once the stages before them are done.
    """
    written = {spec.written_by: form for form, spec in FORMATS.items()}
    for stage in road.recipe.stages if GENERATES in road.task.capabilities else ():
        if stage.kind in written:
            check_writable(road.start, written[stage.kind])


def _written(road: Road, label: str, form: str, options: Options) -> Path:
    return road.folder_of(_in_format(road, label, form, options))


def _in_format(road: Road, label: str, form: str, options: Options) -> str:
    """The label under which an output is to be had in a format, written now unless it was before."""
    found = _format(road, label)
    if found == form:
        return label
    source = FORMATS[form].written_from
    if source is None:
        before = _weights_of(road, label)
    else:
        before = label if source == found else _in_format(road, label, source, {})
    written = f"{label}, as {form.upper()}"
    road.apply_extra(written, _writer(road, label, form, options), before)
    return written


def _weights_of(road: Road, label: str) -> str:
    """The last output up to ``label`` that is in no format yet, or else the graph that the recipe starts from."""
    labels = [START, *road.recipe.labels()]
    found = (one for one in reversed(labels[: labels.index(label) + 1]) if _format(road, one) is None)
    return next(found, START)


def _writer(road: Road, label: str, form: str, options: Options) -> Stage[Any, Any]:
    """The stage that writes an output in a format: of so many bits, or as the recipe has it, or by default."""
    kind = FORMATS[form].written_by
    if FORMATS[form].own_bits:
        bits = _bits(road, label, kind)
        chosen = options if bits["precision"] != _FLOAT or label == road.recipe.labels()[-1] else {}
        # A precision that the recipe gives is not for the bits that it gives to ONNX.
        return STAGES[kind].model_validate({"kind": kind, **({} if "precision" in chosen else bits), **chosen})
    default = STAGES[kind].model_validate({"kind": kind, **options})
    return next((stage for stage in road.recipe.stages if stage.kind == kind), default)


def _bits(road: Road, label: str, kind: str) -> dict[str, Any]:
    """What the recipe's stages for ONNX make of the weights, up to ``label``, in fields of the stage that writes.

    Of several the last one in the fewest bits counts.
    """
    labels = road.recipe.labels()
    before = road.recipe.stages[: labels.index(label) + 1] if label != START else ()
    asked = [found for stage in reversed(before) if (found := stage.wanted_precision()) is not None]
    fewest = min(asked, key=lambda found: int(found["precision"].strip("fpint")), default={"precision": _FLOAT})
    known = STAGES[kind].model_fields
    return {name: value for name, value in fewest.items() if name in known}


def _leads_to(found: str | None, form: str) -> bool:
    """Whether one format can be written from another, or from what is in none yet."""
    while True:
        if found in (None, form):
            return True
        source = FORMATS[form].written_from
        if source is None:
            return False
        form = source


def _format(road: Road, label: str) -> str | None:
    """The format that a stage's output is in for good; None for a model that any of them is written from."""
    kind = getattr(road.gives(label), "kind", None)
    return kind if kind in FORMATS else None
