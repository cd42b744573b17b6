"""Questions about Fashion-MNIST's images, with answers that follow from class or pixels."""

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
"""Kind of each class."""
_BRIGHT = 128
"""Smallest mean of the foreground pixels of a bright image."""
_BACKGROUND = 8
_SEED = 0


def write_questions(members: Path, files: Path, progress: Progress) -> None:
    """Write Fashion-MNIST's splits with the columns text (question), target (answer) and question (its type).

    Raises `SampleError`.
    """
    write_articles(members, files, progress, CLASSES, questions)


def questions(images: np.ndarray, kinds: Sequence[int]) -> Mapping[str, Sequence[str]]:
    """Return a random question for each of ``images`` [n, 28, 28] uint8 with classes ``kinds``."""
    generator = np.random.default_rng(_SEED)
    rows = [_question(image, kind, generator) for image, kind in zip(images, kinds, strict=True)]
    texts, targets, names = zip(*rows, strict=True)
    return {"text": texts, "target": targets, "question": names}


def _question(image: np.ndarray, kind: int, generator: np.random.Generator) -> tuple[str, str, str]:
    question_type = int(generator.integers(4))
    if question_type == 0:
        return f"{generator.choice(WHAT)} ?", f"it is {PHRASES[kind]}", "what"
    if question_type == 1:
        return f"{generator.choice(KIND)} ?", KINDS[kind], "kind"
    if question_type == 2:
        # Half of the questions are about the right class.
        other = (kind + int(generator.integers(1, len(PHRASES)))) % len(PHRASES)
        named = kind if generator.integers(2) else other
        return f"{generator.choice(IS_IT)} ?".format(PHRASES[named]), "yes" if named == kind else "no", "is it"
    foreground = image[image > _BACKGROUND]
    bright = len(foreground) > 0 and float(foreground.mean()) >= _BRIGHT
    return f"{generator.choice(LIGHT)} ?", "bright" if bright else "dark", "light"
