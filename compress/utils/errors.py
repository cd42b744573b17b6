"""Every error that a user may meet, as one tree.

CompressError                   exit code
├── InputError                  2   what the user gave cannot be used
│   ├── RecipeError             2   a recipe or a file like it, with *all* its problems
│   ├── ModelError              2   a model folder, file or identifier
│   ├── DataError               2   a data file, split, column or label
│   ├── SampleError             2   a sample that cannot be fetched or whose digest is wrong
│   ├── BundleError             2   a bundle that was changed, is unsafe to open, or is not what it says
│   └── MissingExtraError       2   an optional package is not installed
├── DeviceError                 3   a device cannot be reached, is taken, went away or lacks what is needed
└── StageError                  3   a stage of the pipeline failed
    ├── IntegrityError          3   a stage's output broke the contract that every output must keep
    └── StorageError            3   the disk is full or a cache entry cannot be read or written

A missed limit or gate is not an error: the run is complete, its report says so, and the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class CompressError(Exception):
    """Base of all expected errors; the command line prints it without a traceback.

    Attributes: ``what`` happened, ``where`` (file, line, field), what was ``expected``, how to ``hint`` it.
    """

    exit_code = 3

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  where:    {self.where}"] if self.where else []
        lines += [f"  expected: {self.expected}"] if self.expected else []
        lines += [f"  hint:     {self.hint}"] if self.hint else []
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What an error of another package says first, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The valid name that a misspelt one most resembles, if any does."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question to put behind a message about an unknown ``name``, or nothing."""
    near = nearest_name(name, names)
    return f" Did you mean {near!r}?" if near else ""


class InputError(CompressError):
    """What the user gave cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in such a file. ``line`` counts from 1; ``field`` is a dotted path such as ``stages.1.distill``."""

    file: str
    line: int | None
    field: str
    found: str
    expected: str
    nearest: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        hint = f" Did you mean {self.nearest!r}?" if self.nearest else ""
        return f"{place}: {self.field}: found {self.found}; expected {self.expected}.{hint}"


class RecipeError(InputError):
    """A recipe, or another file that is read as strictly, with one or more problems, all reported at once."""

    def __init__(self, problems: Sequence[Problem], subject: str = "The recipe", hint: str | None = None) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{subject} has {count}:\n{lines}", hint=hint)


class ModelError(InputError):
    """A model folder, file or identifier cannot be used."""


class DataError(InputError):
    """A data file, split, column or label cannot be used."""


class SampleError(InputError):
    """A sample cannot be fetched, or what was fetched has another digest than the pinned one."""


class BundleError(InputError):
    """A bundle was changed, is unsafe to open, or its model is not what its manifest says."""


class MissingExtraError(InputError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(
            f"{needed_by} needs the package {package!r}, which is not installed.",
            hint=f"pip install 'compress[{extra}]'",
        )


class DeviceError(CompressError):
    """A device cannot be reached, is taken, went away, or lacks what is needed there."""


class StageError(CompressError):
    """A stage of the pipeline failed."""


class IntegrityError(StageError):
    """A stage's output is not finite, unchanged, too large, or predicts otherwise once saved."""


class StorageError(StageError):
    """The disk is full, or a cache entry cannot be read or written."""


def not_whole(what: str, where: object, expected: str | None = None) -> ModelError:
    """The error of an artifact that something is missing from."""
    return ModelError(what, where=str(where), expected=expected, hint="copy the folder again with all of its files")


def broken(what: str, where: object, stage: str) -> ModelError:
    """The error of a file that cannot be opened; ``stage`` makes such files."""
    again = f"write it again with the stage {stage}, or copy the folder again with all of its files"
    return ModelError(what, where=str(where), hint=again)
