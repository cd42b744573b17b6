"""A policy as a file, read as strictly as a recipe."""

from __future__ import annotations

from pathlib import Path

from compress.errors import InputError, Problem, RecipeError
from compress.recipe.policy import Policy
from compress.recipe_source.document import Document, read_document
from compress.recipe_source.translate import validate

SECTION = "gate"


def read_policy(path: Path) -> Policy:
    """Read a YAML file that is a policy, or has one under `gate:` as a recipe does.

    Raises `InputError` with every problem: file, line, field, what was found and what was expected.
    """
    try:
        document = read_document(path)
    except RecipeError as error:
        raise _refused([_of_a_policy(problem) for problem in error.problems]) from None
    policy = _validated(document)
    if policy is None or document.problems:
        raise _refused(document.problems)
    return policy


def _validated(document: Document) -> Policy | None:
    if SECTION not in document.values:
        return validate(Policy, document.values, document, ())
    return validate(Policy, document.values[SECTION], document, (SECTION,))


def _of_a_policy(problem: Problem) -> Problem:
    """The same, where the reader of recipes spoke of a recipe."""
    field = "policy" if problem.field == "recipe" else problem.field
    expected = problem.expected.replace("a YAML recipe", "a YAML policy")
    if "name, task" in expected or "name: my-model" in expected:
        expected = "a mapping such as `rules: [{metric: accuracy, worse_by: 0.5 points}]`"
    return Problem(problem.file, problem.line, field, problem.found, expected, problem.nearest)


def _refused(problems: list[Problem]) -> InputError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "\n".join(f"  {_of_a_policy(problem)}" for problem in problems)
    mend = "docs/recipe.schema.json describes every field, under `gate`"
    return InputError(f"The policy has {count}:\n{lines}", mend=mend)
