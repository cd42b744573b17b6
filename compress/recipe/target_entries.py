"""Targets of a recipe, with the lines of problems in the recipe and in files that describe custom targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.formats.registry import FORMATS
from compress.formats.target_profile import TargetProfile
from compress.formats.targets import PROFILES
from compress.recipe.chosen_target import TARGET_FIELDS, ChosenTarget, TargetFields, format_of, target_problem
from compress.recipe.document import Document, FieldPath, FileKind, describe, read_document
from compress.recipe.validation_errors import expected_names, validate, validate_partly
from compress.stages.registry import STAGES
from compress.utils.errors import RecipeError, nearest_name

SUFFIXES = (".yaml", ".yml")
_TARGET = FileKind(
    "target",
    "The target",
    "a YAML file that describes a target",
    "a mapping with name, format and runtime, such as `name: pi`, `format: onnx`, `runtime: onnxruntime`, `threads: 4`",
)


def read_targets(document: Document, folder: Path, stages: Sequence[str]) -> tuple[str | ChosenTarget, ...]:
    """Return the valid targets of a document, and record the problems of the others.

    ``folder`` is where target files are looked for; ``stages`` are the kinds of the recipe's own stages.
    """
    entries = document.values.get("targets")
    if not isinstance(entries, list):
        document.problem(("targets",), describe(entries), "a list of targets, e.g. `[cpu, browser]`")
        return ()
    targets: dict[str, str | ChosenTarget] = {}
    for index, entry in enumerate(entries):
        path = ("targets", index)
        target = _target(document, path, entry, folder, stages)
        if target is None:
            continue
        name = target if isinstance(target, str) else target.name
        if name in targets:
            document.problem(path, f"a second {name!r}", "each target once")
        targets.setdefault(name, target)
    return tuple(targets.values())


def read_target_file(path: Path) -> TargetProfile:
    """Return the target that a file describes. Raises `InputError` with every problem: file, line, field."""
    document = Document(str(path), _TARGET)
    target = _from_file(document, (), path, ())
    if target is None:
        raise document.error()
    return target.profile()


def _target(
    document: Document, path: FieldPath, entry: Any, folder: Path, stages: Sequence[str]
) -> str | ChosenTarget | None:
    """Return one target entry, or None and record its problems.

    Args:
        document: Receives the problems.
        path: Path of the entry.
        entry: Name, mapping or file.
        folder: Folder of target files.
        stages: Kinds of the recipe's own stages.
    """
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, fields),) = entry.items()
        if fields is None or isinstance(fields, dict):
            return _chosen(document, (*path, name), name, fields or {}, stages)
        document.problem((*path, name), describe(fields), f"the fields of {name} as a mapping")
    elif not isinstance(entry, str):
        document.problem(path, describe(entry), "a target's name, `{NAME: {FIELD: VALUE}}` or a file (.yaml)")
    elif entry.endswith(SUFFIXES):
        return _from_file(document, path, folder / entry, stages)
    elif entry in PROFILES:
        return entry
    else:
        document.problem(path, describe(entry), f"one of {', '.join(PROFILES)}", nearest_name(entry, PROFILES))
    return None


def _from_file(document: Document, path: FieldPath, file: Path, stages: Sequence[str]) -> ChosenTarget | None:
    """Return the target of a file named at ``path``. Its problems keep their own file and line.

    Args:
        document: Receives the problems.
        path: Path of the entry that names the file.
        file: The file.
        stages: Kinds of the recipe's own stages.
    """
    try:
        target_document = read_document(file, _TARGET)
    except RecipeError as error:
        document.problems += error.problems
        document.broken.add(path)
        return None
    fields = dict(target_document.values)
    name = fields.pop("name", None)
    target = None
    if not isinstance(name, str) or name in PROFILES:
        target_document.problem(("name",), describe(name), f"a name that is none of {', '.join(PROFILES)}")
    elif "format" not in fields:
        target_document.problem(("format",), "nothing", f"one of {', '.join(FORMATS)}")
    else:
        format_name = fields["format"]
        runtime = (
            next(iter(FORMATS[format_name].runtimes))
            if isinstance(format_name, str) and format_name in FORMATS
            else None
        )
        target = _chosen(target_document, (), name, {"runtime": runtime, **fields}, stages)
    document.problems += target_document.problems
    document.broken |= {path} if target_document.problems else set()
    return target


def _chosen(
    document: Document, path: FieldPath, name: str, fields: dict[str, Any], stages: Sequence[str]
) -> ChosenTarget | None:
    """Return a target with changed fields, or a custom target.

    Args:
        document: Receives the problems.
        path: Path of the fields.
        name: Name of the target.
        fields: The fields.
        stages: Kinds of the recipe's own stages.
    """
    num_problems = len(document.problems)
    target_fields = {field: value for field, value in fields.items() if field in TARGET_FIELDS}
    options = {field: value for field, value in fields.items() if field not in TARGET_FIELDS}
    validated = (
        validate(TargetFields, target_fields, document, path)
        or validate_partly(TargetFields, target_fields)
        or TargetFields()
    )
    problem = target_problem(name, validated)
    if problem is not None:
        field, description, expected = problem
        suggestion = nearest_name(name, PROFILES) if field is None else None
        document.problem(path if field is None else (*path, field), description, expected, suggestion)
        return None
    kind = FORMATS[format_of(name, validated)].written_by
    _check_options(document, path, kind, options, stages)
    if len(document.problems) > num_problems:
        return None
    return validate(ChosenTarget, {"name": name, **target_fields, "options": options}, document, path)


def _check_options(
    document: Document, path: FieldPath, kind: str | None, options: dict[str, Any], stages: Sequence[str]
) -> None:
    """Check fields of the stage that writes the target's format, unless the recipe has that stage itself.

    Args:
        document: Receives the problems.
        path: Path of the fields.
        kind: The stage that writes the format.
        options: Its fields.
        stages: Kinds of the recipe's own stages.
    """
    names = [name for name in STAGES[kind].model_fields if name != "kind"] if kind else []
    of_stage = f", or of the stage {kind}: {', '.join(names) or 'none'}" if kind else ""
    for field in [field for field in options if field not in names]:
        suggestion = nearest_name(field, (*TARGET_FIELDS, *names))
        expected = f"{expected_names(None, TARGET_FIELDS, 'field')}{of_stage}"
        document.problem((*path, field), "an unknown field", expected, suggestion)
    if kind is None:
        return
    stage_fields = {field: value for field, value in options.items() if field in names}
    if stage_fields and kind in stages:
        stage_path = f"stages.{list(stages).index(kind)}.{kind}"
        document.problem(
            (*path, next(iter(stage_fields))), f"a field of {kind}, a stage of this recipe", f"it at {stage_path}"
        )
    elif stage_fields:
        validate(STAGES[kind], {**stage_fields, "kind": kind}, document, path)
