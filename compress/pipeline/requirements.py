"""Packages and disk space that a recipe needs, and one error for several problems."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from compress.recipe.recipe import Recipe
from compress.tasks.registry import get_task
from compress.utils.errors import CompressError, InputError, MissingExtraError
from compress.utils.installation import extra_containing, has_package

_RUN_FILES_BYTES = 1_000_000
"""Bytes of a run's log and report."""


def missing_packages(recipe: Recipe) -> list[CompressError]:
    """Return one error for each package that a stage or the task needs and that is not installed."""
    users = {
        package: f"The stage {stage.kind}" for stage in reversed(recipe.stages) for package in stage.called_packages()
    }
    users |= dict.fromkeys(get_task(recipe.task).packages, f"The task {recipe.task}")
    errors: list[CompressError] = []
    for package, user in users.items():
        if has_package(package):
            continue
        if extra := extra_containing(package):
            errors.append(MissingExtraError(package, extra, user))
        else:
            what = f"{user} needs the package {package!r}, which is not installed."
            errors.append(InputError(what, hint=f"pip install {package}"))
    return errors


def check_artifacts(artifacts: Path) -> None:
    """Raise `InputError` if the artifacts folder is a file, or its disk has no room for a run's own files."""
    if artifacts.exists() and not artifacts.is_dir():
        raise InputError("The artifacts folder is a file.", where=str(artifacts), expected="a folder")
    free = free_bytes(artifacts)
    if free < _RUN_FILES_BYTES:
        raise disk_error(_RUN_FILES_BYTES, free, artifacts)


def free_bytes(artifacts: Path) -> int:
    """Return the free bytes of the disk on which the artifacts folder is, or will be."""
    folder = artifacts.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_error(needed_bytes: float, free_bytes: int, artifacts: Path) -> InputError:
    """Return the error of a run whose outputs do not fit on the disk of the artifacts folder."""
    return InputError(
        f"The run needs about {needed_bytes / 1e9:.2f} GB of disk, and {free_bytes / 1e9:.2f} GB are free.",
        where=str(artifacts),
        hint="Free some space (`compress cache prune`), or give --artifacts on another disk.",
    )


def combined_error(problems: Sequence[CompressError]) -> InputError:
    """Return one error that lists all problems, or the problem itself if it is the only one."""
    listed = "\n".join(str(problem) for problem in problems)
    if len(problems) > 1:
        return InputError(f"The recipe cannot run here, for {len(problems)} reasons:\n{listed}")
    problem = problems[0]
    return problem if isinstance(problem, InputError) else InputError(f"The recipe cannot run here: {listed}")
