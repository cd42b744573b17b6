"""Tree of every error that a user may meet.

CompressError                   exit code
├── InputError                  2   the user's input cannot be used
│   ├── RecipeError             2   a recipe or a file like it, with *all* its problems
│   ├── ModelError              2   a model folder, file or identifier
│   ├── DataError               2   a data file, split, column or label
│   ├── SampleError             2   a sample that cannot be fetched or whose digest is wrong
│   ├── BundleError             2   a bundle that was changed, is unsafe to open, or contradicts its manifest
│   │   └── UntrustedError      2   a signature that is missing, does not fit, or is by a key that does not count
│   └── MissingExtraError       2   an optional package is not installed
├── DeviceError                 3   a device cannot be reached, is in use, was lost or lacks a requirement
└── StageError                  3   a stage of the pipeline failed
    ├── IntegrityError          3   a stage's output violates the checks that apply to every output
    └── StorageError            3   the disk is full or a cache entry cannot be read or written

A missed limit or gate is not an error: the run is complete, its report contains the verdict, and the exit code is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from compress import DISTRIBUTION

_LONGEST = 30_000
"""Characters of a part of a message."""


def _shown(text: str) -> str:
    """Return a text of foreign files at a length and in characters that can be written."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"
    # JSON may hold halves of characters, which UTF-8 does not have.
    return short.encode("utf-8", "backslashreplace").decode()


class CompressError(Exception):
    """Base class of all expected errors, which the command line prints without a traceback.

    Attributes:
        what: The event, as a sentence.
        where: File, line or field.
        expected: Values that would have been valid.
        hint: Action that fixes the cause.
        errors: The errors that this one lists, if it stands for several.
        position: File, line and field of a field that ``where`` names, if they are known.
    """

    exit_code = 3

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, hint: str | None = None
    ) -> None:
        self.what = _shown(what)
        self.where = None if where is None else _shown(where)
        self.expected = None if expected is None else _shown(expected)
        self.hint = hint
        self.errors: tuple[CompressError, ...] = ()
        self.position: tuple[str, int | None, str] | None = None
        super().__init__(self.what)

    def as_dict(self) -> dict[str, object]:
        """Return type, message, place, expectation and hint, the JSON view of the error, and its problems."""
        parts = {"message": self.what, "where": self.where, "expected": self.expected, "hint": self.hint}
        return {"type": type(self).__name__, **parts, "problems": self.problem_records()}

    def problem_records(self) -> list[dict[str, object]]:
        """Return a record for each problem that the error lists, or for itself, with its position for editors."""
        if self.errors:
            return [record for error in self.errors for record in error.problem_records()]
        # The place of an error in a file is written as FILE:LINE, or as "FILE, row ROW".
        file, line, field = self.position or ((self.where or "").partition(", row ")[0] or None, None, None)
        if self.position is None and (place := re.match(r"(.+?):(\d+)(?=\D|$)", self.where or "")):
            file, line = place[1], int(place[2])
        return [_record(self.what, file, line, field, self.expected, self.hint)]

    def __str__(self) -> str:
        if self.errors:  # they may have got their positions later
            return "\n".join([self.what, *map(str, self.errors)])
        # Aligned labels make the optional parts easy to find.
        lines = [self.what]
        where = self.where
        if self.position is not None and self.position[1] is not None:
            where = f"{self.position[0]}:{self.position[1]}, {where}"
        lines += [f"  where:    {where}"] if where else []
        lines += [f"  expected: {self.expected}"] if self.expected else []
        lines += [f"  hint:     {self.hint}"] if self.hint else []
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """Return the first line of another package's error message, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the valid name that is most similar to a misspelt one, or ``None``."""
    # Compare without case, but return the original spelling.
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = get_close_matches(name.lower(), list(by_lower), n=1)
    if not matches and len(name) > 2:
        matches = [candidate for candidate in by_lower if candidate.startswith(name.lower())]
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question to append to a message about an unknown ``name``, or an empty string."""
    candidate = nearest_name(name, names)
    return f" Did you mean {candidate!r}?" if candidate else ""


class InputError(CompressError):
    """Input of the user that cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a file that is read strictly.

    ``line`` counts from 1; ``field`` is a dotted path such as ``stages.1.distill``.
    """

    file: str
    line: int | None
    field: str
    found: str
    expected: str
    nearest: str | None = None

    def __str__(self) -> str:
        location = self.file if self.line is None else f"{self.file}:{self.line}"
        hint = f" Did you mean {self.nearest!r}?" if self.nearest else ""
        # A misspelt name has a suggestion in place of the long list of valid names.
        expected = "" if self.nearest and self.expected.startswith("a known ") else f"; expected {self.expected}"
        return f"{location}: {self.field}: found {self.found}{expected}.{hint}"


class RecipeError(InputError):
    """Problems of a recipe, or of another file that is read as strictly, reported at once."""

    def __init__(self, problems: Sequence[Problem], subject: str = "The recipe", hint: str | None = None) -> None:
        self.problems = tuple(problems)
        self.valid_part: Any = None
        """The recipe of the valid model and data, if the file has them."""
        self.model_is_valid = False
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{subject} has {count}:\n{lines}", hint=hint)

    def problem_records(self) -> list[dict[str, object]]:
        """Return a record with file, line and field for each problem."""
        return [
            _record(
                f"{problem.field}: found {problem.found}",
                problem.file,
                problem.line,
                problem.field,
                problem.expected,
                f"did you mean {problem.nearest!r}?" if problem.nearest else self.hint,
            )
            for problem in self.problems
        ]


def _record(
    message: str, file: str | None, line: int | None, field: str | None, expected: str | None, hint: str | None
) -> dict[str, object]:
    """Return the JSON view of a problem. All problems are errors; a plan lists its warnings itself."""
    place = {"file": file, "line": line, "field": field}
    return {"severity": "error", "message": message, **place, "expected": expected, "hint": hint}


class ModelError(InputError):
    """A model folder, file or identifier that cannot be used."""


class DataError(InputError):
    """A data file, split, column or label that cannot be used."""

    @classmethod
    def of_all(cls, errors: Sequence[DataError]) -> DataError:
        """Return one error that lists all ``errors``, or the error itself if it is the only one."""
        if len(errors) == 1:
            return errors[0]
        combined = cls(f"The data has {len(errors)} problems:")
        combined.errors = tuple(errors)
        return combined


class SampleError(InputError):
    """A sample that cannot be fetched, or whose digest differs from the pinned one."""


class BundleError(InputError):
    """A bundle that was changed, is unsafe to open, or whose model contradicts its manifest."""


class UntrustedError(BundleError):
    """A signature that is missing, does not fit, or is by a key that does not count."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this distribution."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class MissingExtraError(InputError):
    """A required optional package that is not installed."""

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(
            f"{needed_by} needs the package {package!r}, which is not installed.",
            hint=install_command(extra),
        )


class DeviceError(CompressError):
    """A device that cannot be reached, is in use, was lost, or lacks a requirement."""


class BugError(CompressError):
    """An exception that nobody expected. Its exit code is that of no verdict, so that a gate cannot mistake it."""

    exit_code = 70

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(
            f"This is a bug of compress, not of your input: {what}",
            where=where,
            hint="report it with this file, which has the command and the traceback",
        )


class StageError(CompressError):
    """Failure of a stage of the pipeline."""


class IntegrityError(StageError):
    """Output of a stage that is not finite, unchanged, too large, or predicts differently once reloaded."""


class StorageError(StageError):
    """A full disk, or a cache entry that cannot be read or written."""


def incomplete_artifact_error(what: str, where: object, expected: str | None = None) -> ModelError:
    """Return the error for an artifact with a missing part."""
    return ModelError(what, where=str(where), expected=expected, hint="copy the folder again with all of its files")


def unreadable_file_error(what: str, where: object, stage: str) -> ModelError:
    """Return the error for a file that cannot be opened; ``stage`` names the stage that writes such files."""
    hint = f"write it again with the stage {stage}, or copy the folder again with all of its files"
    return ModelError(what, where=str(where), hint=hint)
