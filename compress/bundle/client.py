"""What a library that answers in a page brings along: its files, their licences, and how a finished page is tried."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Protocol

from compress.bundle.manifest import Licence
from compress.progress import Progress
from compress.samples.sample import Package
from compress.targets import AppProfile

FOLDER = "runtime"
"""Of a bundle: where those files lie."""
MIT, APACHE = "MIT, (c) Microsoft Corporation", "Apache-2.0"
_ONNXRUNTIME_WEB = "LICENSE-onnxruntime-web.txt"


class Runs(NamedTuple):
    """Name, package and version of what runs a page's model."""

    name: str
    package: str
    version: str


class Client(Protocol):
    """One such library, in a module of its own."""

    shared: tuple[str, ...]
    """Files below `web` that its pages have, whatever the task."""
    prepares: bool
    """Whether inputs are prepared and answers read by modules of the task's, from folders below `web`."""

    def runs(self, profile: AppProfile) -> Runs:
        """For a manifest."""

    def licences(self, tokenizes: bool) -> tuple[Licence, ...]:
        """Of what `copy` puts into a bundle."""

    def copy(self, folder: Path, tokenizes: bool, progress: Progress) -> None:
        """Put what a page runs on, and its licences, into the empty ``folder``; npm fetches what is not cached.

        ``tokenizes``: whether the page needs tokenizers. Raises `SampleError` where npm can't, or gives another file
        than the pinned one.
        """

    def try_out(self, folder: Path, progress: Progress) -> None:
        """Run the self-test of a bundle that was just made by the page's own code, where this machine can.

        Raises `BundleError` where it answers otherwise than ONNX Runtime here.
        """


def licence_of(package: Package, licence: str) -> Licence:
    """Of a package that lies in a bundle."""
    return Licence(of=f"{FOLDER}: {package.requirement}", licence=licence)


def copy_licence_of_onnxruntime(folder: Path) -> None:
    """Its package has none."""
    content = (files("compress.bundle") / "web" / _ONNXRUNTIME_WEB).read_bytes()
    (folder / _ONNXRUNTIME_WEB).write_bytes(content)
