"""Normalization of stages to single-key mappings, and overrides (`--set FIELD=VALUE`), on plain values.

Overrides change plain values before validation, so that errors in them are reported like errors in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.recipe.document import Document, FieldPath, describe, dotted, parse_into
from compress.recipe.recipe import Recipe, stage_labels
from compress.stages.registry import STAGES
from compress.utils.errors import nearest_name


def normalize_stages(document: Document) -> None:
    """Rewrite every stage as `{kind: {fields}}`, from a bare name or a mapping with `kind`."""
    stages = document.values.get("stages")
    for index, item in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(item, str):
            stages[index] = {item: {}}
        elif isinstance(item, dict) and isinstance(item.get("kind"), str):
            kind = item["kind"]
            stages[index] = {kind: {name: value for name, value in item.items() if name != "kind"}}
            # The fields are one level deeper now.
            for path in [path for path in document.lines if path[:2] == ("stages", index) and len(path) > 2]:
                document.lines[("stages", index, kind, *path[2:])] = document.lines.pop(path)
        elif isinstance(item, dict) and len(item) == 1:
            ((kind, fields),) = item.items()
            stages[index] = {kind: {} if fields is None else fields}


def apply_override(document: Document, option: str) -> None:
    """Replace one field by ``option``, `FIELD=VALUE`. Record a problem if there is no such field.

    A field of a stage is named by the stage's label (`distill.epochs`) or its position (`stages.1.distill.epochs`).
    """
    override = Document(f"--set {option}")
    name, equals, text = option.partition("=")
    tokens = name.strip().split(".")
    if not equals or not all(tokens):
        override.problem((), describe(option), "FIELD=VALUE, e.g. distill.epochs=2")
    else:
        parse_into(override, text, keep_lines=False)
        tokens = _with_position(document, override, tokens)
    if not override.problems:
        _replace(document, override, tokens)
    document.problems += override.problems


def drop_stages(document: Document, labels: Sequence[str]) -> None:
    """Remove the stages with these labels. Record a problem for a label that no stage has."""
    stages = document.values.get("stages")
    if not isinstance(stages, list):
        return
    all_labels = stage_labels(_kinds(document))
    for label in labels:
        if label not in all_labels:
            document.problem(
                ("stages",), f"no stage {label!r}", f"one of {', '.join(all_labels)}", nearest_name(label, all_labels)
            )
    indices = [index for index, label in enumerate(all_labels) if label not in labels]
    document.values["stages"] = [stages[index] for index in indices]
    new_paths: dict[FieldPath, FieldPath] = {("stages", old): ("stages", new) for new, old in enumerate(indices)}
    lines = {path: line for path, line in document.lines.items() if path[:1] != ("stages",) or len(path) == 1}
    lines |= {(*new_paths[path[:2]], *path[2:]): line for path, line in document.lines.items() if path[:2] in new_paths}
    document.lines = lines


def _kinds(document: Document) -> list[str]:
    """Return the kind of each stage, "" for a stage that is written wrongly."""
    stages = document.values.get("stages")
    return [
        next(iter(item), "") if isinstance(item, dict) else "" for item in (stages if isinstance(stages, list) else ())
    ]


def _with_position(document: Document, override: Document, tokens: list[str]) -> list[str]:
    """Replace a stage's label at the start of a field's name by position and kind. Record a problem if it is unknown.

    Args:
        document: The recipe.
        override: The override, which receives problems.
        tokens: Parts of the field's name.
    """
    kinds, first = _kinds(document), tokens[0]
    labels = stage_labels(kinds)
    if first in labels:
        index = labels.index(first)
        return ["stages", str(index), kinds[index], *tokens[1:]]
    if first not in Recipe.model_fields:
        names = (*filter(None, labels), *Recipe.model_fields)
        expected = f"a stage ({', '.join(filter(None, labels))}) or another field of the recipe"
        override.problem((first,), "no stage or field of this name", expected, nearest_name(first, names))
    return tokens


def _replace(document: Document, given: Document, tokens: list[str]) -> None:
    """Set the field at ``tokens`` to ``given.values``, creating mappings on the way."""
    container: Any = document.values
    path: FieldPath = ()
    created: FieldPath | None = None
    for position, token in enumerate(tokens):
        steps = _steps(given, container, path, token)
        if steps is None:
            return
        for step in steps:
            is_last = position == len(tokens) - 1 and step is steps[-1]
            path = (*path, step)
            if created is None and (is_last or (isinstance(container, dict) and container.get(str(step)) is None)):
                created = path
            if is_last:
                container[step] = given.values
            elif isinstance(container, dict) and container.get(str(step)) is None:
                container[step] = {}
            container = container[step]
    replaced = created or path
    document.forget_lines(replaced)
    document.overridden[replaced] = given.file.removeprefix("--set ")
    if path[:1] == ("stages",):
        normalize_stages(document)


def _steps(given: Document, place: object, path: FieldPath, token: str) -> list[str | int] | None:
    """Return the keys that a token stands for: one, or the stage's kind and the token. Record a problem if none.

    Args:
        given: The override, which receives problems.
        place: The value at ``path``.
        path: Path so far.
        token: Next part of the field's name.
    """
    token_path = (*path, token)
    if isinstance(place, list):
        if token.isdecimal() and int(token) < len(place):
            return [int(token)]
        expected = f"a number from 0 to {len(place) - 1}" if place else "no number: the list is empty"
        given.problem(token_path, describe(token), f"{expected} ({dotted(path)} has {len(place)} entries)")
        return None
    if not isinstance(place, dict):
        given.problem(token_path, f"{describe(place)} at {dotted(path)}", "a field of a mapping")
        return None
    if len(path) == 2 and path[0] == "stages" and len(place) == 1:
        (kind,) = place
        if token == kind:
            return [token]
        if token in STAGES and token not in STAGES.get(kind, STAGES[token]).model_fields:
            given.problem(
                token_path, repr(token), f"{kind!r}, the kind of stage {path[1]}", nearest_name(token, [kind])
            )
            return None
        if not isinstance(place[kind], dict):
            given.problem(token_path, f"{describe(place[kind])} at {dotted(path)}.{kind}", "a field of a mapping")
            return None
        return [kind, token]
    return [token]
