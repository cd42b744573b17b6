"""YAML documents as plain values with the line of each field. Scalars follow the YAML 1.2 core schema.

PyYAML follows YAML 1.1, where `no` is False. Scalars are read by the YAML 1.2 core schema instead.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.utils.errors import Problem, RecipeError, nearest_name
from compress.utils.read_limits import LIMITS

FieldPath = tuple[str | int, ...]

YAML_PREFIX = "tag:yaml.org,2002:"
CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
"""Tag, pattern and first characters of unquoted scalars: 5e-5 is a number, `no` is text."""


_TOO_MANY = (
    "too many or too deeply nested values",
    f"at most {LIMITS.yaml_nodes:,} values, {LIMITS.yaml_depth} levels deep",
)


class _TooMuchError(Exception):
    """Error of a document that is refused as a whole, with the value found and the value expected."""


class _CoreLoader(yaml.SafeLoader):
    """YAML loader that composes nodes by the YAML 1.2 core schema instead of YAML 1.1, and not too many."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    _nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node, a value or its name. Raises `_TooMuchError` for more than any recipe has."""
        self._nodes += 1
        if self._nodes > 2 * LIMITS.yaml_nodes:
            raise _TooMuchError(*_TOO_MANY)
        return super().compose_node(parent, index)


def core_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern of `CORE_SCHEMA` as a regular expression for a whole scalar."""
    return re.compile(rf"(?:{pattern})\Z")


for _tag, _pattern, _first in CORE_SCHEMA:
    _CoreLoader.add_implicit_resolver(YAML_PREFIX + _tag, core_pattern(_pattern), _first)


@dataclass(frozen=True)
class FileKind:
    """Kind of a strict YAML file, with the names used in its problems; ``mapping`` is an example of its content."""

    name: str
    subject: str
    words: str
    mapping: str
    hint: str | None = None


RECIPE = FileKind("recipe", "The recipe", "a YAML recipe", "a mapping of fields such as `name: my-model`")


@dataclass
class Document:
    """Values of a YAML file, the line of every field, and the problems so far.

    ``overridden`` maps a field that a `--set` option replaced to that option. ``broken`` holds the fields that have a
    problem.
    """

    file: str
    kind: FileKind = RECIPE
    values: Any = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    overridden: dict[FieldPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[FieldPath] = field(default_factory=set)

    def location(self, path: FieldPath) -> tuple[str, int | None]:
        """Return file and line of a field, or of the nearest enclosing field. An overridden field has no line."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overridden:
                return f"--set {self.overridden[path[:length]]}", None
            if path[:length] in self.lines:
                return self.file, self.lines[path[:length]]
        return self.file, None

    def problem(self, path: FieldPath, found: str, expected: str, nearest: str | None = None) -> None:
        """Record a problem of a field.

        Args:
            path: Path of the field.
            found: The value found, in words.
            expected: The value expected, in words.
            nearest: A similar valid name, if any.

        Raises:
            RecipeError: With the problems so far, if there are as many as are listed.
        """
        file, line = self.location(path)
        self.broken.add(path)
        self.problems.append(Problem(file, line, dotted(path) or self.kind.name, found, expected, nearest))
        if len(self.problems) == LIMITS.problems:
            expected = "fewer problems; correct these first"
            self.problems.append(
                Problem(self.file, None, self.kind.name, f"at least {LIMITS.problems} problems", expected)
            )
            raise self.error()

    def error(self) -> RecipeError:
        """Return all problems as one error, in the order of their lines."""
        problems = sorted(self.problems, key=lambda problem: (problem.line is None, problem.line or 0))
        return RecipeError(problems, self.kind.subject, self.kind.hint)

    def forget_lines(self, path: FieldPath) -> None:
        """Remove the lines of a field and of everything below it."""
        for line_path in [line_path for line_path in self.lines if line_path[: len(path)] == path]:
            del self.lines[line_path]


def dotted(path: FieldPath) -> str:
    """Return a path with dots: `("stages", 1, "distill")` -> `stages.1.distill`."""
    return ".".join(map(str, path))


def describe(value: object) -> str:
    """Return a value in a few words."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case dict():
            names = ", ".join(list(value)[:6]) + (", ..." if len(value) > 6 else "")
            return f"a mapping with {names}" if value else "an empty mapping"
    return str(value)


def read_document(path: Path, kind: FileKind = RECIPE) -> Document:
    """Read and parse a YAML file. Raises `RecipeError` if it is not a readable YAML mapping."""
    document = Document(str(path), kind)
    text = _text(path, document)
    if text is not None:
        parse_into(document, text)
        if document.values is None and not document.problems:
            fields = "a mapping with at least name, task, model, data and stages"
            document.problem((), "an empty file", fields if kind is RECIPE else kind.mapping)
    if not isinstance(document.values, dict):
        if not document.problems:
            document.problem((), describe(document.values), kind.mapping)
        raise document.error()
    return document


def parse_into(document: Document, text: str, keep_lines: bool = True) -> None:
    """Parse YAML text into ``document.values`` and record problems, and lines if ``keep_lines``."""

    def refuse(found: str, expected: str, line: int | None = None) -> None:
        if keep_lines and line is not None:
            document.lines[()] = line
        document.problem((), found, expected)

    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        document.values = (
            None if node is None else _Values(document, document.lines if keep_lines else {}).read(node, ())
        )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        column = f" at column {mark.column + 1}" if mark else ""
        refuse(f"invalid YAML{column}: {error.problem or error.context}", "YAML", mark.line + 1 if mark else None)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        refuse(f"the character {chr(int(error.character))!r}", "text without control characters", line)
    except _TooMuchError as error:
        refuse(*error.args)
    except RecursionError:
        refuse("too deeply nested values", f"at most {LIMITS.yaml_depth} levels")


def _text(path: Path, document: Document) -> str | None:
    """Return the file's text, or None and record a problem if it cannot be read."""
    expected = document.kind.words
    try:
        if path.stat().st_size > LIMITS.yaml_bytes and not path.is_dir():
            document.problem((), f"a file of {path.stat().st_size:,} bytes", f"{expected} below 1 MB")
            return None
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        document.problem((), "no such file", expected, nearest_sibling(path))
    except IsADirectoryError:
        document.problem((), "a folder", expected)
    except UnicodeDecodeError as error:
        document.lines[()] = content.count(b"\n", 0, error.start) + 1
        document.problem((), f"byte 0x{content[error.start]:02x}, which is not UTF-8", f"{expected} in UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        document.problem((), f"a file that cannot be read ({reason})", expected)
    return None


def nearest_sibling(path: Path) -> str | None:
    """Return the most similar name of a YAML file beside a missing one."""
    try:
        return nearest_name(path.name, [other.name for other in path.parent.glob("*.y*ml")])
    except (OSError, ValueError):  # a name that no folder can have
        return None


@dataclass
class _Values:
    """Converter of YAML nodes to values, which records lines in ``lines`` and problems in the document."""

    document: Document
    lines: dict[FieldPath, int]
    visited: int = 0
    around: list[yaml.Node] = field(default_factory=list)

    def read(self, node: yaml.Node, path: FieldPath) -> Any:
        """Return the node's value. Raises `_TooMuchError` for values that no recipe contains."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.visited += 1
        if node in self.around:
            raise _TooMuchError("an alias to itself", "values that end")
        if self.visited > LIMITS.yaml_nodes or len(self.around) > LIMITS.yaml_depth:
            raise _TooMuchError(*_TOO_MANY)
        self.around.append(node)
        value = self._content(node, path)
        self.around.pop()
        return value

    def _content(self, node: yaml.Node, path: FieldPath) -> Any:
        """Return the value of a mapping, a list or a scalar."""
        if isinstance(node, yaml.MappingNode) and node.tag == YAML_PREFIX + "map":
            # A mapping with YAML merge keys (`<<`) applied.
            merged: dict[str, Any] = {}
            entries: dict[str, Any] = {}
            for key, value in node.value:
                if key.tag == YAML_PREFIX + "merge":
                    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                    for source in sources:
                        content = self.read(source, path)
                        if isinstance(content, dict):
                            merged = {**content, **merged}
                        else:
                            self.lines.setdefault((*path, "<<"), key.start_mark.line + 1)
                            self.document.problem((*path, "<<"), describe(content), "a mapping to merge in")
                elif not isinstance(key, yaml.ScalarNode):
                    self.lines.setdefault((*path, "?"), key.start_mark.line + 1)
                    self.document.problem((*path, "?"), "a list or mapping as a name", "text as a name")
                else:
                    # Add one entry to a mapping, and record a duplicate name as a problem.
                    name = self._text(key.value, path)
                    field_path = (*path, name)
                    if name in entries:
                        first = self.document.lines.get(field_path)
                        self.document.forget_lines(field_path)
                        self.lines.setdefault(field_path, key.start_mark.line + 1)
                        hint = f" (the first is on line {first})" if first else ""
                        self.document.problem(field_path, f"a second {name!r}{hint}", "each name once")
                    else:
                        self.lines[field_path] = key.start_mark.line + 1
                    entries[name] = self.read(value, field_path)
            return {**merged, **entries}
        if isinstance(node, yaml.SequenceNode) and node.tag == YAML_PREFIX + "seq":
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _text(self, text: str, path: FieldPath) -> str:
        """Return a text, or record a problem and return an empty one."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.document.problem(path, "an unpaired surrogate", "valid Unicode text")
            return ""
        return text

    def _scalar(self, node: yaml.Node, path: FieldPath) -> Any:
        """Return text, a number, a boolean or None."""
        text = str(node.value)
        match node.tag.removeprefix(YAML_PREFIX):
            case "str" | "merge":
                return self._text(text, path)
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case ("int" | "float") as kind:
                # A finite number, or record a problem.
                try:
                    if kind == "int" and len(text) <= 100:
                        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
                    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                except ValueError:
                    number = math.nan
                if math.isfinite(number) and kind == "float":
                    return number
                self.document.problem(path, describe(text), "a finite number")
                return None
        self.document.problem(path, f"the YAML tag {node.tag!r}", "plain text, a number, a list or a mapping")
        return None
