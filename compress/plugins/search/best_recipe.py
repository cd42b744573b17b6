"""The recipe that was found, as a file that people read: what differs from where the search began, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compress.pipeline.run import with_absolute_paths
from compress.plugins.search.engine import Engine
from compress.plugins.search.formatting import outcome_words
from compress.plugins.search.parameters import Knob, written
from compress.plugins.search.space import Point, Space
from compress.recipe.loading import dump_recipe
from compress.recipe.recipe import Recipe
from compress.results.metrics import describe_metric


def best_recipe(space: Space, engine: Engine, point: Point, refit: bool = False) -> str:
    """YAML of the recipe at a point, runnable on its own, with a comment at each field that the search chose.

    The rows that chose stay held out unless it is trained from them too (``refit``), so that a run finds everything in
    the cache and gives the same bytes.
    """
    recipe = with_absolute_paths(space.recipe(point, refit=refit), space.folder).model_copy(update={"search": None})
    text = dump_recipe(recipe, defaults=False)
    reasons = {knob.name: reason(space, engine, knob, point) for knob in space.knobs}
    lines = text.splitlines()
    for knob in space.knobs:
        if not knob.is_stage:
            _comment(lines, recipe, space, knob, reasons[knob.name], point)
    left_out = [f"# {knob.name} is left out: {reasons[knob.name]}" for knob, at in zip(space.knobs, point, strict=True)
                if knob.is_stage and at]  # fmt: skip
    head = [
        f"# Found by `compress search` among {space.size:,} recipes: {space.words(point)}.",
        f"# On the rows that choose{', before it learned from them too' if refit else ''}:",
        *(f"#   {line}" for line in outcome_words(engine.goal, engine.known.finished[point])),
        *left_out,
    ]
    return "\n".join([*head, *lines]) + "\n"


def reason(space: Space, engine: Engine, knob: Knob, point: Point) -> str:
    """Why a knob has its value: what recipes that differ in it alone came to, or that none was tried."""
    index = space.knobs.index(knob)
    own, tried = engine.known.finished[point], []
    for other, outcome in engine.known.finished.items():
        alike = all(a == b for at, (a, b) in enumerate(zip(point, other, strict=True)) if at != index)
        if other == point or not alike or other[index] == point[index]:
            continue
        value = knob.values[other[index]]
        keeps = engine.goal.keeps(outcome)
        figures = [
            f"{describe_metric(metric).title.lower()} {outcome.final[metric] / own.final[metric]:.2f} times as much"
            for metric in engine.goal.minimize
            if own.final.get(metric) and metric in outcome.final
        ]
        tried.append(f"{written(value)} gives {', '.join(figures)}" + ("" if keeps else " and misses a limit"))
    if tried:
        return "; ".join(tried)
    return "no recipe that differs in this alone was tried in full"


def _comment(lines: list[str], recipe: Recipe, space: Space, knob: Knob, words: str, point: Point) -> None:
    """Put a comment above a field of a stage, wherever the dump has it."""
    if any(other.is_stage and at and other.stage == knob.stage for other, at in zip(space.knobs, point, strict=True)):
        return
    label, field = space.labels[knob.stage], knob.name.split(".")[-1]
    kinds = _starts(lines, recipe)
    start, end = kinds.get(label, (0, 0))
    for at in range(start, end):
        if re.match(rf"\s+(- )?{re.escape(field)}:", lines[at]):
            indent = len(lines[at]) - len(lines[at].lstrip())
            lines.insert(at, f"{' ' * indent}# {words}")
            return


def _starts(lines: list[str], recipe: Recipe) -> Mapping[str, tuple[int, int]]:
    """Label -> the lines of that stage."""
    begin = lines.index("stages:") + 1
    heads = [at for at in range(begin, len(lines)) if lines[at].startswith("- ")]
    last = next((at for at in range(begin, len(lines)) if re.match(r"[a-z_]+:", lines[at])), len(lines))
    heads = [at for at in heads if at < last]
    ends = [*heads[1:], last]
    return dict(zip(recipe.labels(), zip(heads, ends, strict=True), strict=True))
