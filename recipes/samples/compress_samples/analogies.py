"""Multiple-choice questions from the analogies of Mikolov et al. 2013: capitals, currencies, family, word forms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

WORDS = "questions-words.txt"
QUESTIONS_PER_SECTION = 20
_CHOICES = 4
_PROMPTS = {
    "capital-common-countries": "{} is the capital of {}. {} is the capital of",
    "capital-world": "{} is the capital of {}. {} is the capital of",
    "currency": "The currency of {} is the {}. The currency of {} is the",
    "city-in-state": "{} is a city in {}. {} is a city in",
    "family": "The female counterpart of {} is {}. The female counterpart of {} is",
    "gram1-adjective-to-adverb": "The adverb of {} is {}. The adverb of {} is",
    "gram2-opposite": "The opposite of {} is {}. The opposite of {} is",
    "gram3-comparative": "The comparative of {} is {}. The comparative of {} is",
    "gram4-superlative": "The superlative of {} is {}. The superlative of {} is",
    "gram5-present-participle": "The present participle of {} is {}. The present participle of {} is",
    "gram6-nationality-adjective": "Somebody from {} is {}. Somebody from {} is",
    "gram7-past-tense": "The past tense of {} is {}. The past tense of {} is",
    "gram8-plural": "The plural of {} is {}. The plural of {} is",
    "gram9-plural-verbs": "The third person singular of {} is {}. The third person singular of {} is",
}


class Question(NamedTuple):
    """A multiple-choice question of a section."""

    prompt: str
    choices: list[str]
    answer: str
    section: str


def write_questions(members: Path, files: Path, progress: Progress) -> None:
    """Write questions.parquet (columns of `Question`). Raises `SampleError`."""
    rows = [row for name, lines in read_sections(members / WORDS).items() for row in select_questions(name, lines)]
    columns = {name: [getattr(row, name) for row in rows] for name in Question._fields}
    pa.parquet.write_table(pa.table(columns), files / "questions.parquet")
    progress.note(f"analogies: {len(rows)} questions of {len(_PROMPTS)} sections")


def read_sections(path: Path) -> dict[str, list[list[str]]]:
    """Return the lines of four words of each section. Raises `SampleError` for a file in another format."""
    sections: dict[str, list[list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(": "):
            lines = sections.setdefault(line[2:], [])
        elif line.strip() and sections:
            lines.append(line.split())
    if sections.keys() != _PROMPTS.keys() or any(len(words) != 4 for part in sections.values() for words in part):
        raise SampleError(f"{path.name} does not have 14 sections of analogies with four words per line.")
    return sections


def select_questions(section: str, lines: list[list[str]]) -> list[Question]:
    """Return `QUESTIONS_PER_SECTION` questions of a section, selected by SHA-256.

    Wrong choices are answers of other lines. For word forms, the word in the question is one of them.
    """
    answers = sorted({words[3] for words in lines} | {words[1] for words in lines})
    questions = []
    for words in sorted(lines, key=lambda words: _digest(" ".join(words)))[:QUESTIONS_PER_SECTION]:
        first, second, third, answer = words
        distractors = [third] if section.startswith("gram") else []
        others = sorted(
            (word for word in answers if word not in (answer, *distractors)), key=lambda word: _digest(third + word)
        )
        choices = sorted(
            [answer, *distractors, *others[: _CHOICES - 1 - len(distractors)]], key=lambda word: _digest(word + third)
        )
        questions.append(Question(_PROMPTS[section].format(first, second, third), choices, answer, section))
    return questions


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
