"""Recipes that are installed with the package: `compress run quickstart` runs one by its name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.recipe.document import RECIPE, nearest_sibling, read_document
from compress.utils.errors import InputError, Problem, RecipeError, did_you_mean, nearest_name

SHIPPED = Path(__file__).parents[1] / "shipped_recipes"
"""Folder of the recipes, with the model configs and modules that they name. In a checkout, a link to `recipes/`."""


def find_recipe(reference: Path) -> Path:
    """Return ``reference`` itself, or the recipe of that name that is installed with the package.

    Raises `RecipeError` if there is neither, with the most similar name of a file beside it or of a shipped recipe.
    """
    try:
        exists = reference.exists()
    except OSError:
        # Reading it says why it is not accessible.
        exists = True
    if exists:
        return reference
    shipped = SHIPPED / f"{reference}.yaml"
    if len(reference.parts) == 1 and not reference.suffix and shipped.is_file():
        return shipped
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    nearest = nearest_sibling(reference) or nearest_name(reference.stem, names)
    expected = f"a YAML recipe, or one of the {len(names)} shipped recipes, which `compress recipes` lists"
    problem = Problem(str(reference), None, RECIPE.name, "no such file", expected, nearest)
    raise RecipeError([problem], RECIPE.subject)


def header_field(path: Path, name: str) -> str:
    """Return a field of the comment at the top of a recipe, such as `time` or `expect`, or an empty string.

    A field may continue on lines that are indented further than its name.
    """
    match = re.search(rf"^#   {name}: +(.*(?:\n#    +\S.*)*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return re.sub(r"\s*\n#\s*", " ", match[1]) if match else ""


def copy_recipe(name: str, folder: Path, replace: bool = False) -> list[Path]:
    """Copy a shipped recipe, and the files and folders beside it that it names, and return the copies.

    Raises `InputError` for an unknown name, and for a file that exists unless ``replace`` is true.
    """
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if name not in names:
        message = f"There is no shipped recipe {name!r}.{did_you_mean(name, names)}"
        raise InputError(message, expected=f"one of {', '.join(names)}")
    recipe = SHIPPED / f"{name}.yaml"
    # A module is named as `file.py:function`.
    texts = {text.partition(":")[0] for text in _texts(read_document(recipe).values)}
    sources = [recipe, *(SHIPPED / text for text in sorted(texts) if text and (SHIPPED / text).exists())]
    copies = [folder / source.relative_to(SHIPPED) for source in sources]
    existing = next((copy for copy in copies if copy.exists()), None)
    if existing is not None and not replace:
        raise InputError(f"{existing} exists already.", where=str(existing), hint="give --force to replace it")
    for source, copy in zip(sources, copies, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copy(source, copy)
    return copies


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of a YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
