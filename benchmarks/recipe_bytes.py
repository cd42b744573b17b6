"""Digests of every recipe's output files at tiny scale, to check that a change of the code does not change them.

    python benchmarks/recipe_bytes.py write FILE.json [RECIPE ...]
    python benchmarks/recipe_bytes.py compare BEFORE.json AFTER.json

``write`` runs the recipes in `recipes/`, or those named, with the tiny models and data of
`tests/recipe/test_recipes.py`. Run it before and after the change, on one machine and with the same packages.
``compare`` exits with code 1 if a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import typer

ROOT = Path(__file__).parents[1]
TEST_FOLDERS = ("recipe", "support", "plugins/apps", "plugins/diffusion")


def digest_outputs(recipe_file: Path, folder: Path) -> dict[str, str]:
    """Run a recipe at tiny scale in ``folder``.

    Returns:
        SHA-256 of each file of the model, by path; a failed run has one entry `error`.
    """
    from test_recipes import shrunk

    from compress.pipeline.run import run
    from compress.recipe.loading import read_recipe
    from compress.utils.errors import CompressError
    from compress.utils.progress import SilentProgress
    from compress.utils.storage import digest_file

    try:
        run(shrunk(read_recipe(recipe_file), folder), folder, folder / "artifacts", SilentProgress())
    except CompressError as error:
        return {"error": str(error)}
    latest = next((folder / "artifacts" / "runs").glob("*/latest")).resolve()
    files = sorted(path for path in (latest / "model").rglob("*") if path.is_file())
    return {path.relative_to(latest).as_posix(): digest_file(path) for path in files}


def write(output: Path, names: list[str]) -> int:
    """Run the named recipes, or all, and write their digests after each recipe."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in TEST_FOLDERS]
    digests: dict[str, dict[str, str]] = {}
    for recipe_file in sorted((ROOT / "recipes").rglob("*.yaml")):
        if names and recipe_file.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            digests[recipe_file.stem] = digest_outputs(recipe_file, Path(folder))
        typer.echo(f"{recipe_file.stem}: {digests[recipe_file.stem].get('error') or len(digests[recipe_file.stem])}")
        output.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def compare(before_file: Path, after_file: Path) -> int:
    """Print the files that differ. Return 1 if there are any."""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (before_file, after_file))
    differing = 0
    for recipe in sorted(before.keys() & after.keys()):
        paths = [
            path
            for path in sorted(before[recipe].keys() | after[recipe].keys())
            if before[recipe].get(path) != after[recipe].get(path)
        ]
        typer.echo(f"{recipe}: {'equal' if not paths else 'differs in ' + ', '.join(paths)}")
        differing += bool(paths)
    for recipe in sorted(before.keys() ^ after.keys()):
        typer.echo(f"{recipe}: only in {before_file if recipe in before else after_file}")
    return 1 if differing else 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("output", type=Path)
    writing.add_argument("recipes", nargs="*")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "write":
        return write(options.output, options.recipes)
    return compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
