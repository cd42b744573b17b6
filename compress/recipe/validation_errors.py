"""Translation of pydantic's errors to problems with a line, plain words and the nearest valid name."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.plugins import explain_missing
from compress.recipe.document import Document, FieldPath, describe
from compress.recipe.old_names import OLD_NAMES
from compress.utils.errors import nearest_name

_PERCENT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?%")

AnyModel = TypeVar("AnyModel", bound=BaseModel)

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "value_error": "{error}",
}


def validate(model: type[AnyModel], fields: object, document: Document, path: FieldPath) -> AnyModel | None:
    """Validate as strictly as JSON (no text for numbers) and record every problem.

    Args:
        model: The pydantic model.
        fields: Values to validate.
        document: Receives the problems.
        path: Path of the fields in the document.
    """
    try:
        return model.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _note(detail, model, fields, document, path)
        return None


def validate_partly(model: type[AnyModel], fields: object) -> AnyModel | None:
    """Return the model without its invalid fields, or None if a required field is invalid."""
    try:
        return model.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        invalid = {detail["loc"][0] for detail in error.errors() if detail["loc"]}
    if not isinstance(fields, dict) or not invalid & fields.keys():
        return None
    return validate_partly(model, {name: value for name, value in fields.items() if name not in invalid})


def _note(detail: ErrorDetails, model: type[BaseModel], fields: Any, document: Document, path: FieldPath) -> None:
    """Record one pydantic error as a problem.

    Args:
        detail: The error.
        model: The pydantic model.
        fields: Values that were validated.
        document: Receives the problem.
        path: Path of the fields in the document.
    """
    # The part of a location that names real fields: pydantic adds tags of unions and `[key]`.
    existing: list[str | int] = []
    value = fields
    for step in detail["loc"]:
        keys: Any = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if step in keys:
            value = value[step]
            existing.append(step)
        elif detail["type"] == "missing" and step == detail["loc"][-1]:
            existing.append(step)
    location = tuple(existing)
    where = (*path, *location)
    around = any(where[: len(broken)] == broken for broken in document.broken)
    within = any(broken[: len(where)] == where for broken in document.broken)
    if around or (within and detail["type"] == "value_error"):
        return
    owner = _owner(model, location)
    if detail["type"] == "missing":
        field = owner.model_fields.get(str(location[-1])) if owner else None
        text = f" ({field.description})" if field and field.description else ""
        document.problem(where, "nothing", f"a value{text}; the field is required")
    elif detail["type"] == "extra_forbidden":
        name = str(location[-1])
        names = sorted(owner.model_fields.keys() - {"kind"}) if owner else []
        # A key with the stage or section in front of the field goes first: another stage may still have that field.
        replacement = OLD_NAMES.get(f"{where[-2]}.{name}" if len(where) > 1 else name) or OLD_NAMES.get(name)
        near = None if replacement else nearest_name(name, names)
        document.problem(where, "an unknown field", replacement or expected_names(near, names, "field"), near)
    else:
        expected = _expected(detail)
        near = plugin = None
        if detail["type"] == "float_type" and (percent := _PERCENT.fullmatch(str(detail["input"]))):
            expected = f"a share: {float(percent[1]) / 100:g} for {percent[0]}"
        if detail["type"] in ("literal_error", "enum") and isinstance(detail["input"], str):
            plugin = explain_missing("formats", detail["input"]) if location[-1:] == ("format",) else None
            near = None if plugin else nearest_name(detail["input"], re.findall(r"'([^']*)'", expected))
        document.problem(where, describe(detail["input"]), plugin or expected, near)


def expected_names(near: str | None, names: Iterable[str], noun: str) -> str:
    """Return the valid names in words. A long list is left out if there is a near name."""
    listed = ", ".join(names)
    return f"a known {noun}" if near and len(listed) > 90 else f"one of {listed}" if listed else f"no {noun}"


def _expected(detail: ErrorDetails) -> str:
    """Return the expected value in words."""
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return detail["msg"][:1].lower() + detail["msg"][1:]
    text = template.format(**detail.get("ctx", {}))
    return f"one of {text}" if detail["type"] in ("literal_error", "enum") else text


def _owner(model: type[BaseModel], location: FieldPath) -> type[BaseModel] | None:
    """Return the model class that has the field at the end of a location."""
    owner: type[BaseModel] | None = model
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        field = owner.model_fields.get(step) if owner else None
        owner = _model_within(field.annotation) if field else None
    return owner


def _model_within(annotation: object) -> type[BaseModel] | None:
    """Return the model class in an annotation such as `Student | None` or `tuple[Limit, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if model := _model_within(argument):
            return model
    return None
