"""Write the parts of the documentation that come from the code and from measurements: `make docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from compress.cli import app
from compress.plugins import CATALOGUE, EXTENSION_POINTS, read_specs
from compress.plugins.apps.app_types import APP_TYPES
from compress.plugins.nightly.suite import suite_schema
from compress.recipe.document import read_document
from compress.recipe.loading import recipe_schema
from compress.recipe.shipped import SHIPPED, header_field
from compress.results.report import Report
from compress.stages.base import SEARCH, SEARCH_TIMES
from compress.stages.registry import STAGES
from compress.tasks.registry import TASKS

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
PLUGIN = FOLDER.parent / "tests" / "third_party" / "pt2"


def commands() -> str:
    """Every command with its arguments and options, as Markdown."""
    root = typer.main.get_command(app)
    lines = ["# Commands", "", "Written by `make docs` from the code.", ""]
    for name, command in sorted(_leaves(root, "compress")):
        lines += [f"## {name}", "", (command.help or "").strip(), ""]
        if command.epilog:
            lines += ["```console", command.epilog.removeprefix("Example: ").removeprefix("Examples:\n"), "```", ""]
        lines += ["| parameter | meaning |", "|---|---|"]
        for parameter in command.params:
            if parameter.name in ("help", "install_completion", "show_completion"):
                continue
            shown = (
                (parameter.metavar or str(parameter.name).upper())
                if parameter.param_type_name == "argument"
                else parameter.opts[0]
            )
            lines.append(f"| `{shown}` | {getattr(parameter, 'help', None) or ''} |")
        lines.append("")
    return "\n".join(lines)


def _leaves(command: typer.core.TyperCommand, name: str) -> list[tuple[str, typer.core.TyperCommand]]:
    context = typer.Context(command)
    group = command if isinstance(command, typer.core.TyperGroup) else None
    names = [child for child, entry in group.commands.items() if not entry.hidden] if group else []
    children = {child: command.resolve_command(context, [child])[1] for child in names}
    own = [] if children and not getattr(command, "invoke_without_command", False) else [(name, command)]
    return own + [leaf for child, below in children.items() for leaf in _leaves(below, f"{name} {child}")]


def stages() -> str:
    """Every stage with its fields, as Markdown."""
    lines = ["# Stages", "", "Written by `make docs` from the code.", ""]
    for kind, cls in sorted(STAGES.items()):
        lines += [f"## {kind}", "", _paragraphs(cls.__doc__ or ""), ""]
        lines += ["| field | default | meaning |", "|---|---|---|"] if len(cls.model_fields) > 1 else []
        for name, field in cls.model_fields.items():
            if name != "kind":
                lines.append(
                    f"| `{name}` | {_default(field)} | {_cell((field.description or '') + _searched(field))} |"
                )
        lines.append("")
    return "\n".join(lines)


def tasks() -> str:
    """Which stages are for which tasks, by what the stages themselves ask for, as Markdown."""
    kinds = [kind for task in TASKS.values() for kind in task.variants()]
    names = {stage: [kind.name for kind in kinds if cls.supports(kind.capabilities)] for stage, cls in STAGES.items()}
    for_all = sorted(stage for stage, found in names.items() if len(found) == len(kinds))
    for_one = {stage: found[0] for stage, found in sorted(names.items()) if len(found) == 1}
    columns = [stage for stage, found in names.items() if 1 < len(found) < len(kinds)]
    lines = ["# Tasks", "", "Written by `make docs` from the code: the stages that support each task.", ""]
    lines += [f"- For every task: {', '.join(f'`{stage}`' for stage in for_all)}."]
    for name in dict.fromkeys(for_one.values()):
        lines += [f"- Only for {name}: {', '.join(f'`{stage}`' for stage in for_one if for_one[stage] == name)}."]
    lines += ["", f"| task | capabilities | {' | '.join(columns)} | app |", f"|---|---{'|---' * len(columns)}|---|"]
    for kind in kinds:
        able = [STAGES[stage].supports(kind.capabilities) for stage in columns] + [kind.app_steps in APP_TYPES]
        cells = " | ".join("yes" if one else "" for one in able)
        row = f"| {kind.name} | {', '.join(sorted(kind.capabilities))} | {cells} |"
        # Variants of a task may have the same capabilities.
        lines += [] if row in lines else [row]
    lines += ["", "A task with two rows has two kinds of models. `has classes` includes `has labels`. Stages need:", ""]
    lines += ["| stage | required capabilities | excluded capabilities |", "|---|---|---|"]
    for stage in (*columns, *for_one):
        asked = (", ".join(sorted(one)) for one in (STAGES[stage].requires, STAGES[stage].excludes))
        lines.append(f"| `{stage}` | {' | '.join(asked)} |")
    return "\n".join([*lines, ""])


def report() -> str:
    """Every class and field of a report, as Markdown, the report itself first."""
    classes: list[type[BaseModel]] = [Report]
    lines = [
        "# Report",
        "",
        "Written by `make docs` from the code: the fields of `report.json`, and of `run.report` in Python.",
        "",
    ]
    for cls in classes:
        lines += [f"## {cls.__name__}", "", _paragraphs(cls.__doc__ or "").replace("``", "`"), ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for name, field in cls.model_fields.items():
            classes += [part for part in _models_in(field.annotation) if part not in classes]
            lines.append(
                f"| `{field.alias or name}` | {_type_name(field.annotation)} | {_cell(field.description or '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the records that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _type_name(annotation: object) -> str:
    """Return a type as Markdown, with links to the records that it mentions."""
    is_plain = isinstance(annotation, type) and not get_args(annotation)
    text = annotation.__name__ if is_plain else re.sub(r"(typing|[a-z_]+(\.[a-z_]+)+)\.", "", str(annotation))
    for cls in _models_in(annotation):
        text = re.sub(rf"\b{cls.__name__}\b", f"[{cls.__name__}](#{cls.__name__.lower()})", text)
    return _cell(text.replace(", ...", ""))


def _paragraphs(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.strip().splitlines())


def _searched(field: FieldInfo) -> str:
    """The values that a search tries, where the field says them."""
    extra = field.json_schema_extra
    for key, why in ((SEARCH, ""), (SEARCH_TIMES, ", where times count")):
        tried = extra.get(key) if isinstance(extra, dict) else None
        if isinstance(tried, list):
            return f"; a search tries {', '.join(map(str, tried))}{why}"
    return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    return f"`{json.dumps(value)}`".replace('"', "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def result_pages() -> dict[str, str]:
    """Return every page of `docs/results` and the page of architectures: name -> Markdown.

    A file of `benchmarks/results` names its page, its tables and, for each table, a caption and a conclusion.
    """
    documents: dict[str, list[dict[str, Any]]] = {}
    for document in sorted((json.loads(path.read_text()) for path in RESULTS.glob("*.json")), key=itemgetter("order")):
        documents.setdefault(document["page"], []).append(document)
    pages = {name: _result_page(name, parts) for name, parts in documents.items()}
    # The index lists each page with the first sentence of its first conclusion.
    index = [
        "# Results",
        "",
        "Written by `make docs` from `benchmarks/results/*.json` and the headers of the recipes.",
        "",
    ]
    index += ["## By task", "", *_by_task(), "", "## All measurements", ""]
    index += ["Each page names the machine, the date and the command of its measurements.", ""]
    for name, parts in documents.items():
        if name.startswith("results/"):
            conclusions = [table["conclusion"] for table in parts[0]["tables"] if "conclusion" in table]
            summary = parts[0].get("summary") or next(iter(conclusions), "")
            link = f"[{parts[0]['title']}]({name.removeprefix('results/')})"
            index.append(f"- {link}: {re.split(r'(?<=[.])[ ]', summary)[0]}" if summary else f"- {link}")
    return pages | {"results/index.md": "\n".join([*index, ""])}


def _by_task() -> Iterator[str]:
    """Yield the rows of a table of recipes whose header states a quality, a size and a speed."""
    yield "Each line is a shipped recipe. Its header states the hardware, the time, more results, and if the speed is"
    yield "approximate because other programs ran. [Language models](language-models.md) are measured by perplexity."
    yield from ("", "![The ratios of size and speed as bars](../pictures/by-task.svg)")
    yield from ("", "| task | recipe | quality | size | speed at batch 1 |", "|---|---|---|---|---|")
    for task, recipe, quality, before, after, speed in _expectations():
        yield f"| {task} | `{recipe}` | {quality} | {before} → {after} | {speed}x |"


def _expectations() -> list[tuple[str, ...]]:
    """Return task, name, quality, sizes before and after, and speed-up of recipes whose header states them."""
    rows = []
    for path in SHIPPED.glob("*.yaml"):
        expected = header_field(path, "expect")
        quality = re.match(r"[A-Za-z][^,(]*% -> [^,(]*", expected)
        size = re.search(r"([\d.]+ [kM]B) -> ([\d.]+ [kM]B)", expected)
        speed = re.search(r"([\d.]+)x (?:faster|as fast)", expected)
        if quality and size and speed:
            task = read_document(path).values["task"]
            rows.append((task, path.stem, quality[0].strip(), size[1], size[2], speed[1]))
    return sorted(rows)


def chart() -> str:
    """Return bars of how many times smaller and faster each recipe's result is, as SVG."""
    rows, step, left, colors = _expectations(), 50, 190, ("#00796b", "#f9a825")
    ratios = [(_bytes(before) / _bytes(after), float(speed)) for *_, before, after, speed in rows]
    scale, height = 390 / max(map(max, ratios)), step * len(rows) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" '
        'font-family="sans-serif" font-size="15">',
        f'<rect width="640" height="{height}" rx="8" fill="#f7f9fa"/>',
    ]
    for column, (name, color) in enumerate(zip(("times smaller", "times faster"), colors, strict=True)):
        x = left + 150 * column
        lines.append(
            f'<rect x="{x}" y="15" width="14" height="14" fill="{color}"/><text x="{x + 20}" y="27">{name}</text>'
        )
    for number, (row, pair) in enumerate(zip(rows, ratios, strict=True)):
        y = 45 + step * number
        lines.append(f'<text x="{left - 10}" y="{y + 24}" text-anchor="end">{row[1]}</text>')
        for place, (ratio, color) in enumerate(zip(pair, colors, strict=True)):
            top, width = y + 19 * place, round(ratio * scale)
            lines.append(f'<rect x="{left}" y="{top}" width="{width}" height="16" fill="{color}"/>')
            lines.append(f'<text x="{left + width + 6}" y="{top + 13}" font-size="13">{ratio:.3g}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _bytes(size: str) -> float:
    number, unit = size.split()
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]


def _result_page(name: str, documents: list[dict[str, Any]]) -> str:
    """Return a page that holds the tables of one or several result files."""
    ticks = _ticks(documents[0]["tables"]) if name == "architectures.md" else []
    title = "Supported model families" if ticks else documents[0]["title"]
    lines = [f"# {title}", "", "Written by `make docs` from `benchmarks/results/*.json`.", *ticks]
    for document in documents:
        if document["title"] != title:
            lines += ["", f"## {document['title']}"]
        if "command" in document:
            lines += ["", f"`{document['command']}`, measured {document['measured']} on {document['machine']}."]
        if "text" in document:
            lines += ["", document["text"]]
        for table in document["tables"]:
            lines += ["", *_table(table)]
    return "\n".join([*lines, ""])


TICKS = {
    "ONNX": "ONNX",
    "INT8": "INT8 error",
    "4 bits": "4 bits",
    "fused attention": "attention",
    "GGUF": "GGUF",
    "prune heads": "pruned heads",
    "prune neurons": "pruned neurons",
    "prune layers": "pruned layers",
}
"""Columns of the table of ticks -> columns of the measurements."""


def _ticks(tables: list[dict[str, Any]]) -> list[str]:
    """Return a table for each kind of model that has a tick where a measurement found that something works."""
    lines = ["", "✓ works, ✗ does not. The [details](#details) have numbers and reasons."]
    for table in tables:
        columns = {title: table["columns"].index(name) for title, name in TICKS.items() if name in table["columns"]}
        lines += ["", f"## {table['title']}", "", f"| {' | '.join(('model', *columns))} |"]
        lines += [f"|---|{':---:|' * len(columns)}"]
        for row in table["rows"]:
            cells = ("✗" if row[index] in ("no", "none", "as it is") else "✓" for index in columns.values())
            lines.append(f"| `{row[0]}` | {' | '.join(cells)} |")
    return [*lines, "", "## Details"]


def _table(table: dict[str, Any]) -> Iterator[str]:
    if table.get("title"):
        yield from (f"### {table['title']}", "")
    if "caption" in table:
        yield from (table["caption"], "")
    for row in (table["columns"], ["---"] * len(table["columns"]), *table["rows"]):
        yield f"| {' | '.join(row)} |"
    for sentence in (*table.get("notes", ()), *([table["conclusion"]] if "conclusion" in table else [])):
        yield from ("", sentence)


def extending() -> str:
    """The page that walks through the package of `tests/third_party`, with its files as they are."""
    return re.sub(
        r'(```\w+ title="([^"]+)"\n).*?```',
        lambda block: f"{block[1]}{(PLUGIN / block[2]).read_text()}```",
        (FOLDER / "extending.md").read_text(),
        flags=re.DOTALL,
    )


PAGES = {
    "reference/commands.md": commands,
    "reference/report.md": report,
    "reference/stages.md": stages,
    "reference/tasks.md": tasks,
    "extending.md": extending,
    "pictures/by-task.svg": chart,
} | {name: partial(str, text) for name, text in result_pages().items()}


def catalogue() -> dict[str, dict[str, Any]]:
    """Return what the project's own plug-ins register: for each extension point, the plug-in that has a name."""
    specs = read_specs()
    points = {"commands": {name: spec.name for spec in specs.values() for name in spec.commands}}
    for point in EXTENSION_POINTS:
        points[point] = {name: spec.name for spec in specs.values() for name in getattr(spec, point)}
    plugins = {name: {"summary": spec.summary, "install": spec.install} for name, spec in specs.items()}
    return {"plugins": plugins, **points}


SCHEMAS = {"recipe.schema.json": recipe_schema, "suite.schema.json": suite_schema, str(CATALOGUE): catalogue}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(page())
    for name, schema in SCHEMAS.items():
        (FOLDER / name).write_text(json.dumps(schema(), indent=2) + "\n")
