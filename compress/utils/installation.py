"""Whether what this package needs is installed, and in the versions that were tried together."""

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
class Package:
    """A requirement and the installed version, if any. ``extra`` is ``None`` for what is always needed."""

    name: str
    wanted: str
    installed: str | None
    extra: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that is wanted."""
        requirement = Requirement(f"{self.name}{self.wanted}")
        return self.installed is not None and requirement.specifier.contains(self.installed, prereleases=True)


def is_installed() -> bool:
    """Whether the package itself is installed, rather than found in the current folder."""
    return _version(NAME) is not None


def has_package(name: str) -> bool:
    """Whether a distribution of that name is installed."""
    return _version(name) is not None


def extra_with(package: str) -> str | None:
    """The extra that installs ``package``; ``None`` for what is always installed, or by no extra."""
    wanted = canonicalize_name(package)
    return next((each.extra for each in packages() if canonicalize_name(each.name) == wanted), None)


def packages() -> list[Package]:
    """Every requirement that applies here, those of the extras included, in the order of the project file.

    What an extra takes over from others is listed with those.
    """
    found = []
    for text in _requirements():
        requirement = Requirement(text)
        if requirement.name == NAME:
            continue
        extra = _extra(requirement)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
            wanted = str(requirement.specifier)
            found.append(Package(requirement.name, wanted, _version(requirement.name), extra))
    return found


def _requirements() -> list[str]:
    """Requirements in the form of package metadata, from the project file where the tree is at hand."""
    if not _PYPROJECT.exists():
        return distribution(NAME).requires or []
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts: list[str] = list(project["dependencies"])
    for extra, names in project.get("optional-dependencies", {}).items():
        for name in names:
            text, _, marker = name.partition(";")
            condition = f"({marker.strip()}) and " if marker else ""
            texts.append(f"{text.strip()}; {condition}extra == '{extra}'")
    return texts


def _extra(requirement: Requirement) -> str | None:
    """`gpu` from the marker `extra == "gpu"`."""
    if requirement.marker is None or "extra" not in str(requirement.marker):
        return None
    return str(requirement.marker).split("extra == ")[1].split()[0].strip("\"')")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
