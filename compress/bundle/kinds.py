"""The kinds of input that a bundle may be for, by task."""

from __future__ import annotations

from compress.bundle.image import IMAGES
from compress.bundle.kind import Kind
from compress.bundle.text import TEXTS

KINDS: dict[str, Kind] = {kind.task: kind for kind in (TEXTS, IMAGES)}
