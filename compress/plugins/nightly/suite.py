"""Suite of a nightly run: its recipes, time limits, baselines and policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from compress.formats.targets import TARGETS
from compress.recipe.document import FileKind, describe, nearest_sibling, read_document
from compress.recipe.json_schema import DIALECT
from compress.recipe.policy import Policy
from compress.recipe.validation_errors import validate
from compress.utils.errors import InputError, did_you_mean, nearest_name
from compress.utils.paths import is_file
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
    """One recipe of the suite. Paths start at the suite's folder."""

    recipe: str = Field(min_length=1, description="path of the recipe")
    name: str | None = Field(None, pattern=_NAME, description="name of this entry; default: the recipe's file name")
    set: tuple[str, ...] = Field((), description="fields to replace, as `--set`: `benchmark.seconds=2`")
    targets: tuple[str, ...] = Field((), description="targets to measure; default: the recipe's own targets")
    policy: Policy | None = Field(None, description="rules for a regression; default: the suite's policy")
    time_limit_minutes: float | None = Field(None, gt=0, description="time limit; default: the budget")
    recent: str | None = Field(
        None, min_length=1, description="today's inputs; their drift fails the night, see `compress drift --recent`"
    )

    @property
    def label(self) -> str:
        """Return the name of the entry."""
        return self.name or Path(self.recipe).stem

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return `set`, with the targets as another override."""
        return (*self.set, f"targets=[{', '.join(self.targets)}]") if self.targets else self.set


class NightlySuite(Frozen):
    """Suite. Its entries run in this order; an entry that a night had no time for runs first in the next night."""

    name: str = Field(pattern=_NAME, description="name of the nights' folder, and of the suite in the history")
    description: str = Field("", description="purpose of the suite in one line")
    entries: tuple[SuiteEntry, ...] = Field(min_length=1, description="the recipes")
    budget_minutes: float = Field(480.0, gt=0, description="time limit of the whole night")
    history: str | None = Field(
        None, description="SQLite file that nights are added to; default: in the nights' folder of the artifacts"
    )
    baselines: str | None = Field(
        None, description="folder with one `ENTRY.json` each, written by `compress gate --update`"
    )
    policy: Policy = Field(Policy(), description="rules for a regression, for the gate and for drift")


def read_suite(path: Path) -> NightlySuite:
    """Read a suite. Raises `InputError` with every problem: fields, missing recipes, duplicate names."""
    document = read_document(path, _SUITE)
    suite = validate(NightlySuite, document.values, document, ())
    folder = path.parent
    entries = document.values.get("entries")
    # The values have not been validated, so that one pass reports every problem. Skip the entries without a recipe.
    numbered = [
        (index, entry)
        for index, entry in enumerate(entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), str)
    ]
    # Check each recipe's file, and that names and targets are valid.
    names = set[str]()
    for index, entry in numbered:
        recipe = entry["recipe"]
        if not is_file(folder / recipe):
            expected, near = f"a recipe, from {str(folder)!r}", nearest_sibling(folder / recipe)
            document.problem(("entries", index, "recipe"), f"{recipe!r}, where no file lies", expected, near)
        name = entry["name"] if isinstance(entry.get("name"), str) else Path(recipe).stem
        if name in names:
            field = "name" if "name" in entry else "recipe"
            document.problem(("entries", index, field), f"a second entry {name!r}", "a `name` that no other entry has")
        names.add(name)
        for position, target in enumerate(entry["targets"] if isinstance(entry.get("targets"), list) else ()):
            if isinstance(target, str) and target not in TARGETS:
                location, near = ("entries", index, "targets", position), nearest_name(target, list(TARGETS))
                document.problem(location, describe(target), f"one of {', '.join(TARGETS)}", near)
    if suite is None or document.problems:
        raise document.error()
    return suite


def select_entries(suite: NightlySuite, only: Sequence[str]) -> NightlySuite:
    """Return the suite with the entries named in ``only``, or all. Raises `InputError` for an unknown name."""
    labels = [entry.label for entry in suite.entries]
    for name in only:
        if name not in labels:
            message = f"The suite has no entry {name!r}.{did_you_mean(name, labels)}"
            raise InputError(message, expected=f"one of {', '.join(labels)}")
    selected = tuple(entry for entry in suite.entries if not only or entry.label in only)
    return suite.model_copy(update={"entries": selected})


def suite_schema() -> dict[str, object]:
    """Return the JSON Schema (draft 2020-12) of a suite file, for editors."""
    schema = NightlySuite.model_json_schema()
    # Editors complete the names of targets.
    schema["$defs"]["SuiteEntry"]["properties"]["targets"]["items"] = {"type": "string", "enum": list(TARGETS)}
    return {"$schema": DIALECT, **schema}
