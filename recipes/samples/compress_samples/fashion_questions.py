"""Questions about Fashion-MNIST's pictures, with answers that follow from their class or their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.utils.progress import Progress
from compress_samples.fashion import CLASSES, PHRASES, write_articles

WHAT = ("what is this", "what do you see", "name this article", "what is for sale here")
KIND = ("what kind of thing is it", "where in the shop is it")
IS_IT = ("is this {}", "do you see {}")
LIGHT = ("is it bright or dark", "how light is it")
KINDS = (
    "clothing",
    "clothing",
    "clothing",
    "clothing",
    "clothing",
    "footwear",
    "clothing",
    "footwear",
    "bags",
    "footwear",
)
"""Of each class."""
_BRIGHT = 128
"""Mean of the pixels that are not background."""
_BACKGROUND = 8
_SEED = 0


def write_questions(members: Path, files: Path, progress: Progress) -> None:
    """Write Fashion-MNIST's splits with the columns text, target and question. Raises `SampleError`.

    `text` asks, `target` answers in a sentence or a word, and `question` is the kind: what, kind, is it, light.
    """
    write_articles(members, files, progress, CLASSES, questions)


def questions(images: np.ndarray, kinds: Sequence[int]) -> Mapping[str, Sequence[str]]:
    """A question drawn for each of ``images`` [n, 28, 28] uint8, whose classes are ``kinds``."""
    generator = np.random.default_rng(_SEED)
    rows = [_asked(image, kind, generator) for image, kind in zip(images, kinds, strict=True)]
    texts, targets, names = zip(*rows, strict=True)
    return {"text": texts, "target": targets, "question": names}


def _asked(image: np.ndarray, kind: int, generator: np.random.Generator) -> tuple[str, str, str]:
    drawn = int(generator.integers(4))
    if drawn == 0:
        return f"{generator.choice(WHAT)} ?", f"it is {PHRASES[kind]}", "what"
    if drawn == 1:
        return f"{generator.choice(KIND)} ?", KINDS[kind], "kind"
    if drawn == 2:
        # As often right as wrong.
        other = (kind + int(generator.integers(1, len(PHRASES)))) % len(PHRASES)
        asked = kind if generator.integers(2) else other
        return f"{generator.choice(IS_IT)} ?".format(PHRASES[asked]), "yes" if asked == kind else "no", "is it"
    shown = image[image > _BACKGROUND]
    bright = len(shown) > 0 and float(shown.mean()) >= _BRIGHT
    return f"{generator.choice(LIGHT)} ?", "bright" if bright else "dark", "light"
