"""The search space: parameters of a recipe, and the recipe at each point."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from compress.recipe.document import Document
from compress.recipe.loading import parse_recipe
from compress.recipe.recipe import START, Recipe, Search
from compress.stages.base import AnyStage
from compress.stages.protocols import Trains
from compress.stages.registry import STAGES
from compress.utils.errors import InputError, RecipeError, did_you_mean, first_line

StageFields = dict[str, Any]
"""Fields of a stage as a recipe writes them."""
INCLUDED, LEFT_OUT = "kept", "left out"


@dataclass(frozen=True)
class SearchParameter:
    """Field with its values, the recipe's own first; or a stage that may be left out.

    Attributes:
        name: Field as `--set` names it, or label of the stage.
        values: Values of the field; for an optional stage, kept and left out.
        stage_index: Index of the stage in the recipe.
        is_optional_stage: Whether the parameter leaves out a stage.
        is_after_training: Whether no later stage trains, so that the model before it is shared with other recipes.
    """

    name: str
    values: tuple[Any, ...]
    stage_index: int
    is_optional_stage: bool = False
    is_after_training: bool = False

    @property
    def is_ordered(self) -> bool:
        """Return whether all values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def ranks(self) -> tuple[float, ...]:
        """Return the rank of each value between 0 and 1: numbers by size, lists by length, others by position."""
        sizes = [size for value in self.values if (size := magnitude(value)) is not None]
        keys = sizes if len(sizes) == len(self.values) else [float(index) for index in range(len(self.values))]
        steps = sorted(set(keys))
        return tuple(steps.index(key) / max(len(steps) - 1, 1) for key in keys)


def magnitude(value: object) -> float | None:
    """Return a number, or the length of a list such as the kept layers; None for values that have no order."""
    if isinstance(value, list | tuple):
        return float(len(value))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def short_name(name: str) -> str:
    """Return the name without the position of the stage: `stages.1.prune.heads` -> `prune.heads`."""
    return ".".join(name.split(".")[2:])


def value_text(value: object) -> str:
    """Format a value for people."""
    return value if isinstance(value, str) else json.dumps(value)


def field_path(name: str, kind: str) -> list[str]:
    """Return the path of a field within its stage, without the stage's kind."""
    tokens = name.split(".")
    return tokens[3:] if tokens[2] == kind and len(tokens) > 3 else tokens[2:]


def get_value(fields: Mapping[str, object], path: Sequence[str]) -> object:
    """Return the value at a path of a stage's fields, or None."""
    value: Any = fields
    for token in path:
        value = value.get(token) if isinstance(value, Mapping) else None
    return value


def set_value(fields: StageFields, path: Sequence[str], value: object) -> None:
    """Set the value at a path of a stage's fields, in place."""
    *above, last = path
    for token in above:
        inner = fields.get(token)
        fields[token] = inner if isinstance(inner, dict) else {}
        fields = fields[token]
    fields[last] = value


Point = tuple[int, ...]
"""Index of the value of each parameter. The recipe as it stands is all zeros."""
MAX_ENUMERATED = 10_000
"""Number of recipes above which a space is sampled instead of enumerated."""


@dataclass(eq=False)
class SearchSpace:
    """Recipes that a search may try, for the recipe in ``document``, whose paths are relative to ``folder``.

    Raises `RecipeError` for mistakes of the recipe, `InputError` for a `search:` block that cannot be
    searched.
    """

    document: Document
    folder: Path
    rejected: dict[str, str] = field(default_factory=dict)
    """Values that no recipe can have, such as `stages.1.prune.heads=2`, with the reason."""

    def __post_init__(self) -> None:
        self.parameters = self._parameters()

    def exclude_failing_values(self, failure: Callable[[Point], Exception | None]) -> None:
        """Exclude every value that fails while all else is as in the recipe, and record it in `rejected`.

        Points change, so this must come before any use of them. Raises `InputError` where nothing is left.
        """
        parameters = []
        for index, parameter in enumerate(self.parameters):
            values = [parameter.values[0]]
            for value_index, value in enumerate(parameter.values[1:], 1):
                error = failure(tuple(value_index * (other == index) for other in range(len(self.parameters))))
                if error is None:
                    values.append(value)
                elif parameter.is_optional_stage:
                    self.rejected[f"without {parameter.name}"] = first_line(error)
                else:
                    self.rejected[f"{parameter.name}={value_text(value)}"] = first_line(error)
            parameters.append(replace(parameter, values=tuple(values)))
        self.parameters = self._require_variable(parameters)

    @cached_property
    def base(self) -> Recipe:
        """Recipe as it stands, with the selection rows held out."""
        return self._recipe()

    @property
    def search(self) -> Search:
        """Return the recipe's `search:` block."""
        assert self.base.search is not None, "looked at in _knobs"
        return self.base.search

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of the recipe's stages."""
        return self.base.labels()

    @property
    def origin(self) -> Point:
        """Point of the recipe as it stands."""
        return (0,) * len(self.parameters)

    @property
    def size(self) -> int:
        """Number of recipes; where they cannot be enumerated, equivalent ones are counted too."""
        return len(self._listed) if self._listed is not None else self._product

    @property
    def is_enumerable(self) -> bool:
        """Return whether every recipe can be enumerated."""
        return self._listed is not None

    def points(self, seed: int) -> Sequence[Point]:
        """Return every distinct point, or a sample drawn by ``seed`` of a space that cannot be enumerated."""
        return self._sample(seed) if self._listed is None else self._listed

    @property
    def _product(self) -> int:
        return math.prod(len(parameter.values) for parameter in self.parameters)

    @cached_property
    def _listed(self) -> list[Point] | None:
        # Do not enumerate a product that is likely to be too large even without equivalent points.
        if self._product > 10 * MAX_ENUMERATED:
            return None
        every = itertools.product(*(range(len(parameter.values)) for parameter in self.parameters))
        points = list(dict.fromkeys(map(self.canonicalize, every)))
        return points if len(points) <= MAX_ENUMERATED else None

    @functools.cache  # noqa: B019 - one search uses a space, which lives as long
    def _sample(self, seed: int) -> list[Point]:
        sizes = [len(parameter.values) for parameter in self.parameters]
        rows = np.random.default_rng(seed).integers(0, sizes, (MAX_ENUMERATED, len(sizes))).tolist()
        return list(dict.fromkeys([self.origin, *map(self.canonicalize, rows)]))

    def canonicalize(self, point: Sequence[int]) -> Point:
        """Return the point with the fields of stages that are left out reset to those of the recipe."""
        left_out = self.left_out(point)
        return tuple(
            index if parameter.is_optional_stage or parameter.stage_index not in left_out else 0
            for parameter, index in zip(self.parameters, point, strict=True)
        )

    def left_out(self, point: Sequence[int]) -> set[int]:
        """Return the indices of the stages that a point leaves out."""
        pairs = zip(self.parameters, point, strict=True)
        return {parameter.stage_index for parameter, index in pairs if parameter.is_optional_stage and index}

    def changes(self, point: Point) -> dict[str, object]:
        """Return the values by parameter that differ from the recipe as it stands."""
        pairs = zip(self.parameters, point, strict=True)
        return {parameter.name: parameter.values[index] for parameter, index in pairs if index}

    def describe(self, point: Point) -> str:
        """Describe how a recipe differs from the one as it stands: `prune.heads 0.25, no trim_vocabulary`."""
        parts = []
        for parameter, index in zip(self.parameters, point, strict=True):
            if index and parameter.is_optional_stage:
                parts.append(f"no {parameter.name}")
            elif index:
                parts.append(f"{short_name(parameter.name)} {value_text(parameter.values[index])}")
        return ", ".join(parts) or "the recipe as it stands"

    def stages(self, point: Point) -> tuple[AnyStage, ...]:
        """Return the stages at a point, unchecked for compatibility. Raises `InputError` for values that do not fit."""
        fields, left_out = deepcopy(self._plain), self.left_out(point)
        for parameter, value_index in zip(self.parameters, point, strict=True):
            if value_index and not parameter.is_optional_stage:
                path = field_path(parameter.name, self.base.stages[parameter.stage_index].kind)
                set_value(fields[parameter.stage_index], path, parameter.values[value_index])
        try:
            stages = [stage_fields for index, stage_fields in enumerate(fields) if index not in left_out]
            return tuple(STAGES[stage_fields["kind"]].model_validate(stage_fields) for stage_fields in stages)
        except ValidationError as error:
            raise InputError(f"{self.describe(point)}: {error.errors()[0]['msg']}") from error

    def recipe(self, point: Point, share: float = 1.0, seed: int | None = None, refit: bool = False) -> Recipe:
        """Return the recipe at a point. Raises `RecipeError` where it cannot run.

        Args:
            point: Point of the recipe.
            share: Share of its training time.
            seed: Seed in place of the recipe's own.
            refit: Whether it is trained on the selection rows too.
        """
        changed = self.changes(point)
        stages = {parameter.name for parameter in self.parameters if parameter.is_optional_stage}
        options = [
            f"{name}={json.dumps(to_jsonable_python(value))}" for name, value in changed.items() if name not in stages
        ]
        recipe = self._recipe(options, [name for name in changed if name in stages])
        changes: dict[str, object] = {} if seed is None else {"seed": seed}
        if share < 1:
            changes["stages"] = shorten_training(recipe, share)
        if refit:
            hold_out = tuple(split for split in recipe.data.hold_out or () if split.split != self.search.select.split)
            changes["data"] = recipe.data.model_copy(update={"hold_out": hold_out or None})
        return recipe.model_copy(update=changes)

    def unchecked_recipe(self, point: Point) -> Recipe:
        """Return the recipe at a point, without any check that its stages fit together."""
        return self.base.model_copy(update={"stages": self.stages(point)})

    def identity(self, point: Point) -> str:
        """Return a digest of 12 hex digits that points share whose stages are equal."""
        stages = [stage.model_dump(mode="json") for stage in self.stages(point)]
        return hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()[:12]

    def trains(self, point: Point) -> bool:
        """Return whether a stage after the baseline trains, so that it can be trained in part."""
        recipe = self.unchecked_recipe(point)
        return shorten_training(recipe, 0.5) != recipe.stages

    def _recipe(self, options: Sequence[str] = (), without: Sequence[str] = ()) -> Recipe:
        document = deepcopy(self.document)
        block = document.values.get("search") if isinstance(document.values, dict) else None
        select = block.get("select") if isinstance(block, dict) else None
        # Without an explicit split, the selection rows are held out of the training rows.
        if isinstance(block, dict) and "hold_out" not in (document.values.get("data") or {}):
            rows = Search.model_fields["select"].default.rows
            selection = {"rows": rows, **(select if isinstance(select, dict) else {})}
            options = [*options, f"data.hold_out={json.dumps(selection)}"]
        return parse_recipe(document, self.folder, options, without)

    @cached_property
    def _plain(self) -> list[StageFields]:
        return [stage.model_dump(mode="json") for stage in self.base.stages]

    def _parameters(self) -> tuple[SearchParameter, ...]:
        if self.base.search is None:
            raise InputError(
                "The recipe has no `search:` block.",
                where=self.document.file,
                expected="a block `search:` with choices, or a model and data in place of a recipe",
                hint="e.g. search: {minimize: size_bytes, choices: {stages.1.prune.heads: [0, 0.25, 0.5]}}",
            )
        parameters: list[SearchParameter] = []
        for label in self.search.optional:
            if label not in self.labels:
                raise InputError(
                    f"No stage {label!r} can be left out.{did_you_mean(label, self.labels)}",
                    where="search.optional",
                    expected=f"one of {', '.join(self.labels)}",
                )
            index = self.labels.index(label)
            self._require_after_baseline(index, "search.optional", label)
            values: tuple[str, ...] = (INCLUDED, LEFT_OUT)
            try:
                self._recipe(without=[label])
            except RecipeError as error:
                # It may be left out together with the stages that need it, if other stages are optional too.
                if len(self.search.optional) == 1:
                    self.rejected[f"without {label}"] = str(error.problems[0])
                    values = (INCLUDED,)
            parameters.append(SearchParameter(label, values, index, True, index > self._last_trained))
        parameters += [self._field_parameter(name, values) for name, values in self.search.choices.items()]
        return self._require_variable(parameters)

    def _require_variable(self, parameters: Sequence[SearchParameter]) -> tuple[SearchParameter, ...]:
        variable = tuple(parameter for parameter in parameters if len(parameter.values) > 1)
        if not variable:
            raise InputError(
                "There is nothing to search: the space has the recipe alone.",
                where=self.document.file,
                expected="choices with a further value each, or stages that may be left out",
                hint=" ".join(f"{name}: {reason}." for name, reason in self.rejected.items()) or None,
            )
        return variable

    def _field_parameter(self, name: str, values: Sequence[object]) -> SearchParameter:
        tokens = name.split(".")
        if tokens[0] in self.labels and len(tokens) > 1:
            # A stage named by its label, as `--set` accepts it.
            index = self.labels.index(tokens[0])
            tokens = ["stages", str(index), self.base.stages[index].kind, *tokens[1:]]
            name = ".".join(tokens)
        if tokens[0] != "stages" or len(tokens) < 3 or not tokens[1].isdecimal() or int(tokens[1]) >= len(self.labels):
            raise InputError(
                f"{name!r} cannot vary in a search.",
                where="search.choices",
                expected=f"a field of one of the stages {', '.join(self.labels)}, such as {self.labels[0]}.FIELD",
            )
        index = int(tokens[1])
        self._require_after_baseline(index, "search.choices", name)
        recipe_value = get_value(self._plain[index], field_path(name, self.base.stages[index].kind))
        # The recipe's own value comes first, so that the point of zeros is the recipe as it stands.
        allowed, reason = [recipe_value], ""
        for value in values:
            plain = to_jsonable_python(value)
            if plain in allowed:
                continue
            try:
                # Validate each value alone. Combinations are checked when a search proposes them.
                self._recipe([f"{name}={json.dumps(plain)}"])
            except RecipeError as error:
                reason = self.rejected[f"{name}={value_text(plain)}"] = first_line(error)
            else:
                allowed.append(plain)
        if len(allowed) == 1 and reason:
            raise InputError(f"No value of {name} can be tried: {reason}", where="search.choices")
        return SearchParameter(name, tuple(allowed), index, is_after_training=index > self._last_trained)

    @cached_property
    def _last_trained(self) -> float:
        """Index of the last stage after the baseline that trains; infinite where none does."""
        pairs = zip(self.base.stages, shorten_training(self.base, 0.5), strict=True)
        return max((index for index, (stage, short) in enumerate(pairs) if stage != short), default=math.inf)

    def _require_after_baseline(self, index: int, where: str, name: str) -> None:
        """Raise `InputError` for a stage before the baseline, which must be the same for all recipes."""
        if index < first_varied(self.base):
            raise InputError(
                f"{name} would change the baseline {self.base.baseline!r}.",
                where=where,
                expected=f"stages after {self.base.baseline!r}",
                hint="name an earlier baseline, or leave it as it is",
            )


def shorten_training(recipe: Recipe, share: float) -> tuple[AnyStage, ...]:
    """Return the stages of a recipe, with those after the baseline trained for a share of their time."""
    first = first_varied(recipe)
    return tuple(
        stage.shortened(share) if index >= first and isinstance(stage, Trains) else stage
        for index, stage in enumerate(recipe.stages)
    )


def first_varied(recipe: Recipe) -> int:
    """Return the index of the first stage after the baseline."""
    return 0 if recipe.baseline == START else recipe.labels().index(recipe.baseline) + 1
