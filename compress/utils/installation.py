"""Installed versions of the packages that this project requires."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "compress"
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class RequiredPackage:
    """A requirement and its installed version, if any. ``extra`` is ``None`` for packages that are always required."""

    name: str
    specifier: str
    installed: str | None
    extra: str | None = None

    @property
    def is_satisfied(self) -> bool:
        """Return True if an installed version matches the specifier."""
        requirement = Requirement(f"{self.name}{self.specifier}")
        return self.installed is not None and requirement.specifier.contains(self.installed, prereleases=True)


def is_installed() -> bool:
    """Return True if this package is installed, rather than imported from the current folder."""
    return _version(NAME) is not None


def has_package(name: str) -> bool:
    """Return True if a distribution of that name is installed."""
    return _version(name) is not None


def extra_containing(package: str) -> str | None:
    """Return the extra that installs ``package``; ``None`` if it is always installed or no extra has it."""
    canonical_name = canonicalize_name(package)
    return next(
        (requirement.extra for requirement in packages() if canonicalize_name(requirement.name) == canonical_name), None
    )


def packages() -> list[RequiredPackage]:
    """Return every requirement that applies to this platform, also those of extras, in the project file's order.

    A requirement that an extra inherits from another extra is listed with the other one.
    """
    required = []
    for text in _requirements():
        requirement = Requirement(text)
        # An extra that includes other extras refers to the package itself.
        if requirement.name == NAME:
            continue
        extra = _extra(requirement)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
            specifiers = str(requirement.specifier)
            required.append(RequiredPackage(requirement.name, specifiers, _version(requirement.name), extra))
    return required


def _requirements() -> list[str]:
    """Return requirements in the form of package metadata, read from the project file if it is present."""
    # An installed package has metadata instead of a project file.
    if not _PYPROJECT.exists():
        return distribution(NAME).requires or []
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts: list[str] = list(project["dependencies"])
    for extra, names in project.get("optional-dependencies", {}).items():
        for name in names:
            text, _, marker = name.partition(";")
            # Write markers in the form that package metadata uses.
            condition = f"({marker.strip()}) and " if marker else ""
            texts.append(f"{text.strip()}; {condition}extra == '{extra}'")
    return texts


def _extra(requirement: Requirement) -> str | None:
    """Return the extra that a marker such as `extra == "gpu"` names."""
    if requirement.marker is None or "extra" not in str(requirement.marker):
        return None
    return str(requirement.marker).split("extra == ")[1].split()[0].strip("\"')")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
