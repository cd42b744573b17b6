"""The suite of a night: which recipes, for how long, against which baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from compress.formats.targets import TARGETS
from compress.recipe.document import Document, FileKind, describe, nearest_sibling, read_document
from compress.recipe.json_schema import DIALECT
from compress.recipe.policy import Policy
from compress.recipe.validation_errors import validate
from compress.utils.errors import InputError, did_you_mean, nearest_name
from compress.utils.pydantic_models import Frozen

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

_SUITE = FileKind(
    "suite",
    "The suite",
    "a YAML suite",
    "a mapping with at least a name and entries, e.g. `entries: [{recipe: tiny.yaml}]`",
    "docs/suite.schema.json describes every field",
)


class SuiteEntry(Frozen):
    """One recipe of the suite. Paths count from the suite's folder."""

    recipe: str = Field(min_length=1, description="path of the recipe")
    name: str | None = Field(None, pattern=_NAME, description="of this entry; default: the recipe's file name")
    set: tuple[str, ...] = Field((), description="fields to replace, as `--set`: `benchmark.seconds=2`")
    targets: tuple[str, ...] = Field((), description="where it is measured; default: the recipe's own targets")
    policy: Policy | None = Field(None, description="what counts as a regression; default: the suite's policy")
    time_limit_minutes: float | None = Field(None, gt=0, description="after this it is ended; default: the budget")
    recent: str | None = Field(
        None, min_length=1, description="today's inputs, whose drift of use fails the night: `compress drift --recent`"
    )

    @property
    def label(self) -> str:
        """What the entry is called."""
        return self.name or Path(self.recipe).stem

    @property
    def overrides(self) -> tuple[str, ...]:
        """`set`, and the targets as another field to replace."""
        return (*self.set, f"targets=[{', '.join(self.targets)}]") if self.targets else self.set


class NightlySuite(Frozen):
    """What a night runs, in this order; an entry that a night had no time for goes first the next night."""

    name: str = Field(pattern=_NAME, description="names the folder of the nights, and the nights in the history")
    description: str = Field("", description="one line on what the suite is for")
    entries: tuple[SuiteEntry, ...] = Field(min_length=1, description="the recipes")
    budget_minutes: float = Field(480.0, gt=0, description="of the whole night")
    history: str | None = Field(
        None, description="SQLite file that nights are added to; default: beside the nights among the artifacts"
    )
    baselines: str | None = Field(
        None, description="folder with one `ENTRY.json` each, written by `compress gate --update`"
    )
    policy: Policy = Field(Policy(), description="what counts as a regression, for the gate and for drift")


def read_suite(path: Path) -> NightlySuite:
    """Read a suite. Raises `InputError` with every problem: fields, recipes that are not there, names used twice."""
    document = read_document(path, _SUITE)
    suite = validate(NightlySuite, document.values, document, ())
    _check_entries(document, path.parent)
    if suite is None or document.problems:
        raise document.error()
    return suite


def select_entries(suite: NightlySuite, only: Sequence[str]) -> NightlySuite:
    """The suite with the entries named in ``only``, or all. Raises `InputError` for a name that no entry has."""
    known = [entry.label for entry in suite.entries]
    for name in only:
        if name not in known:
            said = f"The suite has no entry {name!r}.{did_you_mean(name, known)}"
            raise InputError(said, expected=f"one of {', '.join(known)}")
    kept = tuple(entry for entry in suite.entries if not only or entry.label in only)
    return suite.model_copy(update={"entries": kept})


def suite_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a suite file, for editors."""
    schema = NightlySuite.model_json_schema()
    schema["$defs"]["SuiteEntry"]["properties"]["targets"]["items"] = {"type": "string", "enum": list(TARGETS)}
    return {"$schema": DIALECT, **schema}


def _check_entries(document: Document, folder: Path) -> None:
    entries = document.values.get("entries")
    known = [
        (index, entry)
        for index, entry in enumerate(entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), str)
    ]
    names = [entry["name"] if isinstance(entry.get("name"), str) else Path(entry["recipe"]).stem for _, entry in known]
    counts, seen = Counter(names), set[str]()
    for (index, entry), name in zip(known, names, strict=True):
        place = ("entries", index)
        _check_recipe(document, folder, (*place, "recipe"), entry["recipe"])
        if counts[name] > 1 and name in seen:
            field = "name" if "name" in entry else "recipe"
            document.problem((*place, field), f"a second entry {name!r}", "a `name` that no other entry has")
        seen.add(name)
        for position, target in enumerate(entry["targets"] if isinstance(entry.get("targets"), list) else ()):
            if isinstance(target, str) and target not in TARGETS:
                near = nearest_name(target, list(TARGETS))
                document.problem(
                    (*place, "targets", position), describe(target), f"one of {', '.join(TARGETS)}", near
                )  # fmt: skip


def _check_recipe(document: Document, folder: Path, place: tuple[str | int, ...], recipe: str) -> None:
    path = folder / recipe
    if not path.is_file():
        expected = f"a recipe, from {str(folder)!r}"
        document.problem(place, f"{recipe!r}, where no file lies", expected, nearest_sibling(path))
