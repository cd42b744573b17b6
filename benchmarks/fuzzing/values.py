"""Structure-aware mutations of JSON and YAML: wrong types, huge numbers, deep nesting, duplicate keys, odd text.

A mutator takes a generator, the content of a file and the contents of other files of its kind, and returns bytes.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fuzzing.contents import mutate_bytes

Path = tuple[str | int, ...]

NUMBERS = (
    *(0, 1, -1, 2, 3, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-9, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "\n", "\t", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "~", "-", "--help"),
    *("nan", "null", "true", "0", "1", "-1", "1e999", "0x10", "1,000", "\u0660", "auto", "none", "None", "%s%n", "{}"),
    *("{0.__class__}", "{{ 1/0 }}", "<script>", "a\x00b", "\x1b[2J", "\x7f", "\u202e", "\ufeff", "\ufffe", "\u2028"),
    *("\ud800", "\U0001f600", "\u00df\u0130", "a" * 300, "a" * 70_000, "[", "(", "(a+)+$", "*", "?", "re:(", "re:.*"),
    *("2026-13-45", "2026-01-01T00:00:00", "2026-01-01T00:00:00+00:00", "0" * 64, "=1+1", "sample:", "a@b", "@"),
    *("~nosuchuser/x", "a." * 3000, "\u00b2", "\u0663", "1" * 5000, "x" * 300 + "/y"),
)


class Raw:
    """Text that stands in a JSON document as it is."""

    def __init__(self, text: str) -> None:
        self.text = text


_AGAIN = "\0again:"
"""Prefix of a key that is written a second time."""
_RAW = re.compile(r'"\\u0000raw(\d+)\\u0000"')
RAWS = (
    *("1" * 5000, "-" + "9" * 400, "1e999999", "1.", "+1", "01", "0x1", "NaN", "-Infinity", "'a'", "undefined", ""),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\x41"', '"\n"', '"\t"', "/* */ 1", "[1,]", "{,}"),
)


def _nested(chance: random.Random) -> Raw:
    depth = chance.choice((9, 41, 65, 129, 500, 990, 1100, 3000, 100_000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    return Raw(opening * depth + "1" + closing * (depth if chance.random() < 0.8 else 0))


def any_value(chance: random.Random, depth: int = 0) -> Any:
    """Return a value of any type."""
    match chance.randrange(12):
        case 0 | 1 | 2:
            return chance.choice(NUMBERS)
        case 3 | 4 | 5:
            return chance.choice(TEXTS)
        case 6:
            return chance.choice((None, True, False))
        case 7:
            return [any_value(chance, depth + 1) for _ in range(chance.randrange(4))] if depth < 3 else []
        case 8:
            keys = chance.sample(TEXTS, chance.randrange(3))
            return {key: any_value(chance, depth + 1) for key in keys} if depth < 3 else {}
        case 9:
            return Raw(chance.choice(RAWS)) if chance.random() < 0.3 else chance.choice(NUMBERS)
        case 10:
            return _nested(chance) if chance.random() < 0.2 else []
        case _:
            return [any_value(chance, 3)] * chance.choice((1, 2, 5, 300))


def paths_in(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every value in a tree, without the root."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def value_at(value: Any, path: Path) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


def replaced(value: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """Return a copy in which ``change`` was applied to the value at a path; everything else is shared."""
    if not path:
        return change(value)
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], change)
    return copy


def _changed(chance: random.Random, old: Any) -> Any:
    """Return a value like the old one."""
    if isinstance(old, bool):
        return chance.choice((not old, int(old), str(old), [old]))
    if isinstance(old, int | float):
        options = (-old, old + 1, old - 1, old * 2, old * 10**6, old + 0.5, str(old), [old], {"a": old}, 0, True)
        return chance.choice(options)
    if isinstance(old, str):
        options = (old[::-1], old[:-1], old + "x", old * 50, old + chance.choice(TEXTS), chance.choice(TEXTS) + old)
        return chance.choice((*options, old.upper(), [old], {old: old}, len(old), None, old.replace("/", "//")))
    if isinstance(old, list):
        options = (old * 2, old * 100, old[::-1], old[:1], old[1:], [], {}, [old], None, dict(enumerate(map(str, old))))
        return chance.choice(options)
    if isinstance(old, dict):
        options = ({}, [], list(old), list(old.values()), [old], {**old, "x": 1}, {"": old}, None, str(old)[:80])
        return chance.choice(options)
    return any_value(chance)


def _wrong_everywhere(chance: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _wrong_everywhere(chance, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_wrong_everywhere(chance, inner) for inner in value]
    return any_value(chance, 2)


def mutate_value(chance: random.Random, value: Any, others: Sequence[Any]) -> Any:
    """Return a tree with one to four edits; its parts may come from ``others``."""
    if chance.random() < 0.02:
        value = _wrong_everywhere(chance, value)
        return value if _count(value) <= _MAX_VALUES else any_value(chance, 3)
    for _ in range(chance.choice((1, 1, 1, 1, 2, 3, 4))):
        paths = list(paths_in(value))
        if not paths or chance.random() < 0.01:
            return any_value(chance)
        # Shallow fields are chosen as often as deep ones, of which there are more.
        depth = chance.choice(sorted({len(path) for path in paths}))
        path = chance.choice([path for path in paths if len(path) == depth])
        value = _edited(chance, value, path, paths, others)
    # Copies of copies could fill the memory of the fuzzer itself.
    return value if _count(value) <= _MAX_VALUES else any_value(chance, 3)


_MAX_VALUES = 50_000


def _count(value: Any) -> int:
    """Return the number of values in a tree, or more than `_MAX_VALUES`."""
    count, waiting = 0, [value]
    while waiting and count <= _MAX_VALUES:
        item = waiting.pop()
        count += 1
        if isinstance(item, dict | list):
            count += len(item)
            waiting += (item.values() if isinstance(item, dict) else item) if count <= _MAX_VALUES else ()
    return count


def _edited(chance: random.Random, value: Any, path: Path, paths: list[Path], others: Sequence[Any]) -> Any:
    parent, key = path[:-1], path[-1]

    def without(container: Any) -> Any:
        copy = container.copy()
        del copy[key]
        return copy

    def with_item(container: Any) -> Any:
        new = any_value(chance)
        if isinstance(container, dict):
            names = [name for other in (*others, value) for name in _names(other)] or ["a"]
            name = chance.choice((chance.choice(names), chance.choice(TEXTS), _AGAIN + str(key)))
            return {**container, name: new}
        at = chance.randrange(len(container) + 1)
        return [*container[:at], new, *container[at:]]

    def renamed(container: Any) -> Any:
        if not isinstance(container, dict):
            return container[::-1]
        new = chance.choice((chance.choice(TEXTS), str(key) + "x", str(key).upper(), str(key)[:-1]))
        return {new if name == key else name: inner for name, inner in container.items()}

    match chance.randrange(10):
        case 0:
            return replaced(value, parent, without)
        case 1:
            return replaced(value, parent, with_item)
        case 2:
            return replaced(value, parent, renamed)
        case 3 | 4:
            return replaced(value, path, lambda _: any_value(chance))
        case 5:
            source = chance.choice((value, *others))
            places = paths if source is value else list(paths_in(source)) or [()]
            part = value_at(source, chance.choice(places))
            return replaced(value, path, lambda _: part)
    return replaced(value, path, lambda old: _changed(chance, old))


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def dump_json(value: Any, ascii_only: bool = True) -> bytes:
    """Return a tree as JSON, with raw texts and duplicate keys."""
    raws: list[str] = []

    def token(raw: Raw) -> str:
        raws.append(raw.text)
        return f"\0raw{len(raws) - 1}\0"

    text = json.dumps(value, default=token, ensure_ascii=ascii_only)
    if "\\u0000" in text:
        text = text.replace('"\\u0000again:', '"')
        # A long text that a list repeats would fill the memory of the fuzzer itself.
        short = sum(map(len, raws)) > 1_000_000
        text = _RAW.sub(lambda match: raws[int(match[1])][: 20 if short else None], text)
    return text.encode("utf-8", "surrogatepass")


@functools.lru_cache(maxsize=256)
def _parsed(content: bytes) -> Any:
    return json.loads(content)


_JSON_TOKENS = tuple(
    text.encode()
    for text in (
        *("{", "}", "[", "]", ",", ":", '"', "\\", "null", "true", "1e400", "-", "\ufeff", "\0", "//", "\\u0000"),
        *("\\ud800", "[" * 2000, '{"a":' * 2000, "9" * 5000, "NaN", "Infinity", "\x1b", "\x80", "\n", "\u2028"),
    )
)


def mutate_json(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the tree of a JSON document, in one of seven cases its text."""
    if chance.randrange(7) == 0:
        return mutate_text(chance, content, others, _JSON_TOKENS)
    value = mutate_value(chance, _parsed(content), [_parsed(other) for other in others])
    return dump_json(value, ascii_only=chance.random() < 0.8)


def mutate_json_lines(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate single lines of JSON, or their order."""
    lines = content.splitlines()
    if chance.randrange(4) == 0:
        return mutate_text(chance, content, others, _JSON_TOKENS)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        try:
            lines[at] = mutate_json(chance, lines[at], chance.sample(lines, min(2, len(lines))))
        except ValueError:  # a line that was mutated before
            lines[at] = mutate_bytes(chance, lines[at], ())
    return b"\n".join(lines) + (b"\n" if chance.random() < 0.9 else b"")


def mutate_text(chance: random.Random, content: bytes, others: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """Insert tokens, move and copy lines, change bytes and the encoding."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(7):
            case 0 | 1 if tokens:
                content = content[:at] + chance.choice(tokens) * chance.choice((1, 1, 1, 3)) + content[at:]
            case 2:
                lines = content.splitlines(keepends=True) or [b""]
                index = chance.randrange(len(lines))
                lines[index] *= chance.choice((0, 2, 3, 500 if len(lines[index]) < 200 else 2))
                content = b"".join(lines)
            case 3:
                lines = content.splitlines(keepends=True)
                chance.shuffle(lines)
                content = b"".join(lines)
            case 4 if chance.random() < 0.3:
                encoding = chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7"))
                content = content.decode("utf-8", "replace").encode(encoding, "replace")
            case _:
                content = mutate_bytes(chance, content, others)
        if len(content) > 3_000_000:
            break
    return content


_YAML_TOKENS = tuple(
    text.encode()
    for text in (
        *(
            "- ",
            ": ",
            "? ",
            "&a ",
            "*a",
            "*a\n",
            "<<: *a\n",
            "<<: ",
            "!!python/object/apply:os.system ",
            "!!set ",
            "!x ",
        ),
        *(
            "!!binary ",
            "|\n",
            ">-\n",
            "---\n",
            "...\n",
            "%YAML 1.1\n",
            "%TAG ! x\n",
            "\t",
            "#",
            "'",
            '"',
            "[",
            "{",
            "}",
        ),
        *(
            "]",
            "\n",
            "\n  ",
            "a: &b [*b]\n",
            "\0",
            "\x1b",
            "\ufeff",
            "\x85",
            "\u2028",
            "0x",
            "0o8",
            ".nan",
            ".inf",
            "~",
        ),
        *(
            "1" * 120,
            "[" * 500,
            "{a: " * 100,
            "- " * 300,
            "? " * 300,
            "k: &k {x: 1}\n",
            "\\ud800",
            '"\\ud800"',
            "@",
            "`",
        ),
        *("1_000", "12:30:45", "2026-01-01", "yes", "on", "=", "<<"),
    )
)


def mutate_yaml(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the tree of a YAML document, which is written as JSON or in blocks, or its text."""
    if chance.randrange(3) == 0:
        return mutate_text(chance, content, others, _YAML_TOKENS)
    value = mutate_value(chance, _parsed_yaml(content), [_parsed_yaml(other) for other in others])
    if chance.randrange(4) == 0:
        try:
            import yaml

            return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
        except Exception:  # noqa: BLE001, a value that only JSON can hold
            pass
    return dump_json(value, ascii_only=chance.random() < 0.5)


@functools.lru_cache(maxsize=256)
def _parsed_yaml(content: bytes) -> Any:
    import yaml

    return yaml.safe_load(content)


_TABLE_TOKENS = tuple(
    text.encode()
    for text in (
        *(
            ",",
            ";",
            "\t",
            "|",
            '"',
            '""',
            '"\n"',
            "\n",
            "\r",
            "\r\n",
            "\0",
            "\x1a",
            "\ufeff",
            "\x85",
            "\u2028",
            "'",
            "\\",
        ),
        *("\x1b[31m", "=1+1", "nan", "1e999", "a" * 70_000, "," * 3000, '"' * 3001, "\x81", "\udcff", "text", "label"),
    )
    if "\udcff" not in text
)


def mutate_table(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate text with separators."""
    return mutate_text(chance, content, others, _TABLE_TOKENS)


def mutate_template(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate a Jinja template."""
    tokens = (
        "{{",
        "}}",
        "{%",
        "%}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ 1/0 }}",
        "{{ messages }}",
        "| trim",
    )
    more = ("{% if x %}", "{% endif %}", "{{ x.y.z }}", "{{ raise_exception('a') }}", "{{ range(10**9) }}", "{#", "#}")
    return mutate_text(chance, content, others, [token.encode() for token in (*tokens, *more)])


def mutate_xml(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate attributes and tags of an XML document."""
    if chance.randrange(3) == 0:
        tokens = (
            "<",
            ">",
            "&amp;",
            "&x;",
            "<!DOCTYPE x>",
            "<![CDATA[",
            "<layer>",
            "</layer>",
            "<data/>",
            "\0",
            "&#0;",
            "]]>",
        )
        more = ("<a>" * 3000, "<a>" * 100_000, '<?xml encoding="utf-16"?>', "<!ENTITY x 'y'>", "\ufeff", "<!--")
        return mutate_text(chance, content, others, [token.encode() for token in (*tokens, *more)])
    places = list(re.finditer(rb'="([^"]*)"', content))
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.choice(places)
        kinds = (
            "f32",
            "f16",
            "bf16",
            "f8e4m3",
            "u4",
            "i4",
            "nf4",
            "u1",
            "boolean",
            "string",
            "",
            "i65",
            "undefined",
            "x",
        )
        shapes = (
            "",
            "2,4",
            "-1,2",
            "0",
            "2,,4",
            "9" * 5000,
            "2;4",
            "1" + ",1" * 100,
            "18446744073709551616",
            "a",
            "\u0663",
        )
        more = (str(chance.choice((*NUMBERS, 40, 48, 63, 64, 65))), "Const", "a." * 3000, "&#x1b;", "&lt;")
        new = chance.choice((*kinds, *shapes, *more, *more)).encode()
        if b'"' + place[1] + b'"' in content:
            content = content.replace(b'="' + place[1] + b'"', b'="' + new + b'"', chance.choice((1, 1, 99)))
    return content


def mutate_front_matter(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the YAML between the first lines of `---` of a model card, or the whole card."""
    parts = content.split(b"---\n", 2)
    if chance.randrange(6) == 0 or len(parts) < 3:
        return mutate_text(chance, content, others, _YAML_TOKENS)
    return parts[0] + b"---\n" + mutate_yaml(chance, parts[1], ()) + b"\n---\n" + parts[2]
