"""A recipe's targets, with the lines of whatever is wrong in them or in the files that describe a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.formats.registry import FORMATS
from compress.formats.target_profile import Profile
from compress.formats.targets import PROFILES
from compress.recipe.chosen_target import OWN_FIELDS, ChosenTarget, TargetFields, form_of, objection_to
from compress.recipe.document import Document, FieldPath, FileKind, describe, read_document
from compress.recipe.validation_errors import near_or_all, salvage, validate
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
    """The valid ones of the document's targets; of the others every problem is noted.

    ``folder`` is where files are looked for, ``stages`` are the kinds of the recipe's own stages.
    """
    entries = document.values.get("targets")
    if not isinstance(entries, list):
        document.problem(("targets",), describe(entries), "a list of targets, e.g. `[cpu, browser]`")
        return ()
    found: dict[str, str | ChosenTarget] = {}
    for index, entry in enumerate(entries):
        path = ("targets", index)
        read = _target(document, path, entry, folder, stages)
        if read is None:
            continue
        name = read if isinstance(read, str) else read.name
        if name in found:
            document.problem(path, f"a second {name!r}", "each target once")
        found.setdefault(name, read)
    return tuple(found.values())


def read_target_file(path: Path) -> Profile:
    """The target that a file describes. Raises `InputError` with every problem: file, line, field."""
    document = Document(str(path), _TARGET)
    read = _from_file(document, (), path, ())
    if read is None:
        raise document.refusal()
    return read.profile()


def _target(
    document: Document, path: FieldPath, entry: Any, folder: Path, stages: Sequence[str]
) -> str | ChosenTarget | None:
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
    """The target of a file named at ``path``, whose problems become the document's, each with its own file and line."""
    try:
        own = read_document(file, _TARGET)
    except RecipeError as error:
        document.problems += error.problems
        document.broken.add(path)
        return None
    fields = dict(own.values)
    name = fields.pop("name", None)
    read = None
    if not isinstance(name, str) or name in PROFILES:
        own.problem(("name",), describe(name), f"a name that is none of {', '.join(PROFILES)}")
    elif "format" not in fields:
        own.problem(("format",), "nothing", f"one of {', '.join(FORMATS)}")
    else:
        form = fields["format"]
        runtime = next(iter(FORMATS[form].runtimes)) if isinstance(form, str) and form in FORMATS else None
        read = _chosen(own, (), name, {"runtime": runtime, **fields}, stages)
    document.problems += own.problems
    document.broken |= {path} if own.problems else set()
    return read


def _chosen(
    document: Document, path: FieldPath, name: str, fields: dict[str, Any], stages: Sequence[str]
) -> ChosenTarget | None:
    """A target with changes, or of the user's own; its fields lie at ``path``."""
    before = len(document.problems)
    own = {field: value for field, value in fields.items() if field in OWN_FIELDS}
    rest = {field: value for field, value in fields.items() if field not in OWN_FIELDS}
    read = validate(TargetFields, own, document, path) or salvage(TargetFields, own) or TargetFields()
    unsafe_member_reason = objection_to(name, read)
    if unsafe_member_reason is not None:
        field, found, expected = unsafe_member_reason
        near = nearest_name(name, PROFILES) if field is None else None
        document.problem(path if field is None else (*path, field), found, expected, near)
        return None
    kind = FORMATS[form_of(name, read)].written_by
    _check_options(document, path, kind, rest, stages)
    if len(document.problems) > before:
        return None
    return validate(ChosenTarget, {"name": name, **own, "options": rest}, document, path)


def _check_options(
    document: Document, path: FieldPath, kind: str | None, options: dict[str, Any], stages: Sequence[str]
) -> None:
    """Fields of the stage ``kind``, by its own model, where the recipe hasn't that stage itself."""
    names = [name for name in STAGES[kind].model_fields if name != "kind"] if kind else []
    of_stage = f", or of the stage {kind}: {', '.join(names) or 'none'}" if kind else ""
    for field in [field for field in options if field not in names]:
        near = nearest_name(field, (*OWN_FIELDS, *names))
        expected = f"{near_or_all(None, OWN_FIELDS, 'field')}{of_stage}"
        document.problem((*path, field), "an unknown field", expected, near)
    if kind is None:
        return
    known = {field: value for field, value in options.items() if field in names}
    if known and kind in stages:
        place = f"stages.{list(stages).index(kind)}.{kind}"
        document.problem((*path, next(iter(known))), f"a field of {kind}, a stage of this recipe", f"it at {place}")
    elif known:
        validate(STAGES[kind], {**known, "kind": kind}, document, path)
