"""Registry of samples: package files pinned by digest, and the preparation that turns them into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from compress import DISTRIBUTION
from compress.plugins import UnusablePluginError, find_extensions, load_extension, plugin_problems
from compress.utils.errors import SampleError, did_you_mean

Manager = Literal["pip", "apt", "npm"]
_SIGNS = {"pip": "==", "apt": "=", "npm": "@"}


@dataclass(frozen=True)
class Package:
    """Package file with its pinned digest and the members that are extracted.

    ``filename`` and ``sha256`` belong to the file that the package manager downloads. ``members`` are relative to
    ``folder`` in the archive (or in ``inner_archive``), and keep their directories. `*` in a member matches within one
    directory level.
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
        """Return name and version in the manager's syntax: `torch==2.13.0`, `coreutils=9.7-3`, `three@0.180.0`."""
        return f"{self.distribution}{_SIGNS[self.manager]}{self.version}"


@dataclass(frozen=True)
class Sample:
    """Sample pinned to the bytes of its package files.

    ``preparation`` is `module:function`, which converts the members of all packages to the sample's files. ``revision``
    increases when the same packages are converted to other files. ``spdx`` is the SPDX expression of the part of
    ``licence`` that applies to the files themselves.
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
    def download_bytes(self) -> int:
        """Return the size of all packages."""
        return sum(package.download_bytes for package in self.packages)

    @property
    def requirements(self) -> str:
        """Return all packages with their versions, for display."""
        return ", ".join(package.requirement for package in self.packages)


@cache
def known_samples() -> Mapping[str, Sample]:
    """Return every sample by name. An entry point names a tuple of samples; unusable ones are in `plugin_problems`."""
    samples: dict[str, Sample] = {}

    def accept(value: object) -> tuple[Sample, ...]:
        if not isinstance(value, tuple) or not all(isinstance(item, Sample) for item in value):
            raise UnusablePluginError("it is no tuple of `compress.data.samples.sample.Sample`")
        duplicates = [item.name for item in value if item.name in samples]
        if duplicates:
            raise UnusablePluginError(
                f"another package has samples named {', '.join(duplicates)}; uninstall one of the two"
            )
        return value

    for extension in find_extensions("samples").values():
        samples.update({sample.name: sample for sample in load_extension(extension, accept) or ()})
    return MappingProxyType(samples)


def find_sample(name: str) -> Sample:
    """Return the sample of that name, with or without the prefix `sample:`. Raises `SampleError`."""
    bare = name.removeprefix("sample:")
    samples = known_samples()
    if bare in samples:
        return samples[bare]
    sentences = [f"There is no sample {bare!r}."]
    sentences += [str(problem) for problem in plugin_problems() if problem.point == "samples"]
    raise SampleError(
        " ".join(sentences),
        expected="a known sample" if samples else "a package of samples, of which none is installed",
        hint=f"{did_you_mean(bare, samples)} `compress samples` lists them".strip()
        if samples
        else f"pip install --force-reinstall {DISTRIBUTION}",
    )
