"""A small package file with the structure of the real one, and a progress that records its calls."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.data.samples.sample import Sample

OTHERS = {
    "amazonReviewSnippets_GroundTruth.txt": ["1_1\t-0.9\tThe screen broke", "1_2\t0.1\tFILM   7 is good"],
    "nytEditorialSnippets_GroundTruth.txt": ["1_1\t0.4\tSkadden, Arps, Slate, Meagher &amp;amp; Flom"],
    "tweets_GroundTruth.txt": ["1\t2.7\tI &lt;3 it", "2\t2.7\ti  &lt;3 IT", "3\t0.0\tso so"],
}


class RecordingProgress:
    """Progress that records its notes and the steps of each bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, tuple[int, int]] = {}

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        count = 0
        for item in items:
            count += 1
            yield item
        self.steps[description] = (count, total)

    def note(self, message: str) -> None:
        self.notes.append(message)


def movie_lines(count: int = 2_700) -> list[str]:
    """Return review lines: odd numbers are positive, even ones negative, and every 26th is neutral."""
    return [
        f"{i}\t{0.5 if i % 26 == 0 else 0.6 if i % 2 else -3.25}\tFilm {i} is {'good' if i % 2 else 'bad'}"
        for i in range(count)
    ]


def write_package(path: Path, members: dict[str, list[str]]) -> None:
    """Write a zip that holds a license and a tar.gz, like the source distribution of vaderSentiment."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, lines in members.items():
            content = "\r\n".join(lines).encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("vaderSentiment-0.5/LICENSE.txt", "The MIT License")
        package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())


def pinned_to(sample: Sample, path: Path) -> Sample:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (package,) = sample.packages
    return replace(sample, packages=(replace(package, filename=path.name, sha256=digest, download_bytes=len(content)),))
