"""Single-key stages and `--set FIELD=VALUE`, both on a document's plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.recipe.document import Document, FieldPath, describe, dotted, parse_into
from compress.recipe.recipe import stage_labels
from compress.stages.registry import STAGES
from compress.utils.errors import nearest_name


def single_key(document: Document, index: int) -> None:
    """Rewrite stage ``index`` as `{kind: {fields}}`, from a bare name or a mapping with `kind`."""
    stages, path = document.values["stages"], ("stages", index)
    item = stages[index]
    if isinstance(item, str):
        stages[index] = {item: {}}
    elif isinstance(item, dict) and isinstance(item.get("kind"), str):
        kind = item["kind"]
        stages[index] = {kind: {name: value for name, value in item.items() if name != "kind"}}
        moved = {known: line for known, line in document.lines.items() if known[:2] == path and len(known) > 2}
        for known, line in moved.items():
            del document.lines[known]
            document.lines[(*path, kind, *known[2:])] = line
    elif isinstance(item, dict) and len(item) == 1:
        ((kind, fields),) = item.items()
        stages[index] = {kind: {} if fields is None else fields}


def single_keys(document: Document) -> None:
    """Rewrite every stage of the document."""
    stages = document.values.get("stages")
    for index in range(len(stages) if isinstance(stages, list) else 0):
        single_key(document, index)


def apply_override(document: Document, option: str) -> None:
    """Replace one field by ``option``, `FIELD=VALUE`. Notes a problem if it has no place."""
    given = Document(f"--set {option}")
    name, equals, text = option.partition("=")
    tokens = name.strip().split(".")
    if not equals or not all(tokens):
        given.problem((), describe(option), "FIELD=VALUE, e.g. stages.1.distill.epochs=2")
    else:
        parse_into(given, text, keep_lines=False)
    if not given.problems:
        _replace(document, given, tokens)
    document.problems += given.problems


def drop_stages(document: Document, labels: Sequence[str]) -> None:
    """Leave out the stages of those labels. Notes a problem for a label that no stage has."""
    stages = document.values.get("stages")
    if not labels or not isinstance(stages, list):
        return
    kinds = [next(iter(item), "") if isinstance(item, dict) else "" for item in stages]
    own = stage_labels(kinds)
    for label in labels:
        if label not in own:
            document.problem(("stages",), f"no stage {label!r}", f"one of {', '.join(own)}", nearest_name(label, own))
    kept = [index for index, label in enumerate(own) if label not in labels]
    document.values["stages"] = [stages[index] for index in kept]
    moved: dict[FieldPath, FieldPath] = {("stages", old): ("stages", new) for new, old in enumerate(kept)}
    lines = {path: line for path, line in document.lines.items() if path[:1] != ("stages",) or len(path) == 1}
    lines |= {(*moved[path[:2]], *path[2:]): line for path, line in document.lines.items() if path[:2] in moved}
    document.lines = lines


def _replace(document: Document, given: Document, tokens: list[str]) -> None:
    """Walk to the place of ``tokens`` and put ``given.values`` there, making mappings on the way."""
    place: Any = document.values
    path: FieldPath = ()
    created: FieldPath | None = None
    for position, token in enumerate(tokens):
        steps = _steps(given, place, path, token)
        if steps is None:
            return
        for step in steps:
            last = position == len(tokens) - 1 and step is steps[-1]
            path = (*path, step)
            if created is None and (last or (isinstance(place, dict) and place.get(str(step)) is None)):
                created = path
            if last:
                place[step] = given.values
            elif isinstance(place, dict) and place.get(str(step)) is None:
                place[step] = {}
            place = place[step]
    replaced = created or path
    document.forget_lines(replaced)
    document.overridden[replaced] = given.file.removeprefix("--set ")
    if path[:1] == ("stages",):
        single_keys(document)


def _steps(given: Document, place: Any, path: FieldPath, token: str) -> list[str | int] | None:
    """The keys that ``token`` stands for: one, or the stage's kind and the token. Notes why there is none."""
    here = (*path, token)
    if isinstance(place, list):
        if token.isdecimal() and int(token) < len(place):
            return [int(token)]
        last = f"a number from 0 to {len(place) - 1}" if place else "no number: the list is empty"
        given.problem(here, describe(token), f"{last} ({dotted(path)} has {len(place)} entries)")
        return None
    if not isinstance(place, dict):
        given.problem(here, f"{describe(place)} at {dotted(path)}", "a field of a mapping")
        return None
    if len(path) == 2 and path[0] == "stages" and len(place) == 1:
        (kind,) = place
        if token == kind:
            return [token]
        if token in STAGES and token not in STAGES.get(kind, STAGES[token]).model_fields:
            given.problem(here, repr(token), f"{kind!r}, the kind of stage {path[1]}", nearest_name(token, [kind]))
            return None
        if not isinstance(place[kind], dict):
            given.problem(here, f"{describe(place[kind])} at {dotted(path)}.{kind}", "a field of a mapping")
            return None
        return [kind, token]
    return [token]
