"""A policy as a file, read as strictly as a recipe."""

from __future__ import annotations

from pathlib import Path

from compress.recipe.policy import Policy
from compress.recipe_source.document import FileKind, read_document
from compress.recipe_source.translate import validate

SECTION = "gate"
_POLICY = FileKind(
    "policy",
    "The policy",
    "a YAML policy",
    "a mapping such as `rules: [{metric: accuracy, worse_by: 0.5 points}]`",
    "docs/recipe.schema.json describes every field, under `gate`",
)


def read_policy(path: Path) -> Policy:
    """Read a YAML file that is a policy, or has one under `gate:` as a recipe does.

    Raises `RecipeError` with every problem: file, line, field, what was found and what was expected.
    """
    document = read_document(path, _POLICY)
    below = (SECTION,) if SECTION in document.values else ()
    policy = validate(Policy, document.values[SECTION] if below else document.values, document, below)
    if policy is None:
        raise document.refusal()
    return policy
