"""Whether drift of use is found and not imagined, and whether an A/B test may be looked at after every request.

    python benchmarks/drift_of_use.py drift INT8_RUN TRIMMED_RUN      # 20 planted shifts, 200 windows of one source
    python benchmarks/drift_of_use.py ab INT8_RUN TRIMMED_RUN         # a model against itself, and a loss of 3 points

The runs are of `recipes/minilm-int8.yaml` and `recipes/quickstart.yaml`. Everything that the looks need is seen once of
every row; a window is some of the rows. Shifts are planted into the rows themselves, before the model sees them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from compress.cli.artifact import Artifact, find_artifact
from compress.formats.silence import quiet_libraries
from compress.formats.targets import find_target
from compress.progress import SilentProgress
from compress.samples.fetch import sample_directory
from compress.use.drift import LEVEL, judged, look_at
from compress.use.observed import Model, Observed, observe
from compress.use.rows import Sample

RESULTS = Path(__file__).parent / "results" / "drift-of-use.json"
REFERENCE, WINDOW, WINDOWS = 600, 200, 200
Change = Callable[[Sequence[str], random.Random], list[str]]
_WORDS = ("quark", "lepton", "hadron", "boson", "neutrino", "gluon", "photon", "baryon", "plasma", "tensor", "spinor")
_TYPOS = "abcdefghijklmnopqrstuvwxyz"


def _each(change: Callable[[str, random.Random], str], share: float = 1.0) -> Change:
    """A shift of each text, or of a ``share`` of them."""
    return lambda texts, chance: [change(text, chance) if chance.random() < share else text for text in texts]


def _typos(text: str, chance: random.Random, every: int = 12) -> str:
    hit = [letter.isalpha() and chance.randrange(every) == 0 for letter in text]
    return "".join(chance.choice(_TYPOS) if wrong else letter for wrong, letter in zip(hit, text, strict=True))


def _jargon(text: str, chance: random.Random, every: int = 8) -> str:
    return " ".join(chance.choice(_WORDS) if chance.randrange(every) == 0 else word for word in text.split())


def _among(*words: str, every: int = 10) -> Callable[[str, random.Random], str]:
    def change(text: str, chance: random.Random) -> str:
        made: list[str] = []
        for word in text.split():
            made.append(word)
            if chance.randrange(every) == 0:
                made.append(chance.choice(words))
        return " ".join(made) or text

    return change


def _sorted_by(key: Callable[[str], float], share: float) -> Change:
    """The rows of the largest ``key`` of a larger draw, so that some of the source come more often."""
    return lambda texts, chance: sorted(texts, key=key, reverse=True)[: int(len(texts) * share)]


def _others(sample: str, file: str, column: str, share: float = 1.0) -> Change:
    """Texts of another source in place of a ``share`` of the rows."""

    def change(texts: Sequence[str], chance: random.Random) -> list[str]:
        import pyarrow.parquet as parquet

        found = parquet.read_table(sample_directory(sample) / file)[column].to_pylist()
        pieces = [text[start : start + 200] for text in found for start in range(0, min(len(text), 2000), 200)]
        chosen = chance.sample([piece for piece in pieces if piece.strip()], len(texts))
        return [new if chance.random() < share else old for new, old in zip(chosen, texts, strict=True)]

    return change


def _repeat(text: str, chance: random.Random) -> str:
    return f"{text} {text} {text}"


SHIFTS: dict[str, Change] = {
    "whole reviews from another page (snippets)": _others("snippets", "unlabeled.parquet", "text"),
    "Bible verses": _others("verses", "test.parquet", "text"),
    "half of the rows are Bible verses": _others("verses", "test.parquet", "text", 0.5),
    "Wikipedia's text": _others("wiki", "test.parquet", "text"),
    "typing errors, a letter in 12": _each(_typos),
    "typing errors in half of the rows": _each(_typos, 0.5),
    "physics in place of a word in 8": _each(_jargon),
    "physics in half of the rows": _each(_jargon, 0.5),
    "emoji behind a word in 10": _each(_among("\U0001f600", "\U0001f4a9", "\U0001f3ac")),
    "Greek words": _each(_among("\u03c4\u03b1\u03b9\u03bd\u03af\u03b1", "\u03ba\u03b1\u03bb\u03ae")),
    "HTML left in": _each(_among("<br />", "<b>", "</b>", "&amp;", every=6)),
    "web addresses": _each(lambda text, chance: f"{text} https://t.co/{chance.randrange(10**9):x}"),
    "texts cut after 6 words": _each(lambda text, chance: " ".join(text.split()[:6])),
    "texts three times as long": _each(_repeat),
    "the first words only of half of the rows": _each(lambda text, chance: " ".join(text.split()[:6]), 0.5),
    "the longest third": _sorted_by(len, 1 / 3),
    "the shortest third": _sorted_by(lambda text: -len(text), 1 / 3),
    "capitals spaced out": _each(lambda text, chance: " ".join(text.upper().replace(" ", "_")), 0.3),
    "hashtags, words run together": _each(lambda text, chance: "#" + "".join(text.split()[:8]) + " " + text),
    "numbers behind a word in 6": _each(
        lambda text, chance: _among(*(str(chance.randrange(10**6)) for _ in range(9)), every=6)(text, chance)
    ),
}


def opened(run: Path) -> tuple[Artifact, Model]:
    """A run, ready to be looked at."""
    found = find_artifact(run, None)
    return found, Model(found.folder, found.recipe, found.task, find_target("cpu"))


def texts_of(artifact: Artifact) -> list[str]:
    """All held-out rows of the source, in a random order."""
    data = artifact.dataset(SilentProgress())
    texts = [text for split in ("test", "validation") for text in data.split(split)["text"].to_pylist()]
    random.Random(0).shuffle(texts)
    return texts


def seen(model: Model, texts: Sequence[str]) -> Observed:
    """Everything of every row."""
    return observe(model, Sample("", pa.table({"text": list(texts)}), len(texts)), SilentProgress(), "", len(texts))


def drifts(model: Model, before: Observed, now: Observed) -> list[str]:
    """Names of the looks that drifted."""
    looks = judged(look_at(model, before, now), LEVEL, model.recipe)
    return [look.name for look in looks if look.verdict == "drift"]


def find_shifts(model: Model, before: Observed, texts: Sequence[str], shifts: Sequence[str]) -> dict[str, list[str]]:
    """What is found of each planted shift of fresh rows."""
    found = {}
    for name in shifts:
        chance = random.Random(name)
        # What chooses among rows has more to choose from.
        changed = SHIFTS[name](chance.sample(list(texts), min(len(texts), 3 * WINDOW)), chance)[:WINDOW]
        found[name] = drifts(model, before, seen(model, changed))
    return found


def windows(model: Model, whole: Observed, count: int, rows: int) -> list[list[str]]:
    """What is imagined in windows of the same source, each with a reference of its own, of ``rows`` rows."""
    found = []
    for number in range(count):
        order = np.random.default_rng(number).permutation(rows)
        before, now = order[:REFERENCE], order[REFERENCE : REFERENCE + WINDOW]
        found.append(drifts(model, whole.take(np.sort(before)), whole.take(np.sort(now))))
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _choose() -> None:
    """Which part of it."""


@app.command()
def drift(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs: the static INT8 one, the trimmed one.")],
    count: Annotated[int, typer.Option(help="Windows of the same source, together.")] = WINDOWS,
    write: Annotated[bool, typer.Option("--write", help="Keep the figures in benchmarks/results.")] = False,
) -> None:
    """Shifts found and alarms without any, half of each on each run."""
    quiet_libraries()
    found: dict[str, list[str]] = {}
    alarms: list[list[str]] = []
    for place, run in enumerate(runs):
        artifact, model = opened(run)
        texts = texts_of(artifact)
        reference, fresh = texts[:REFERENCE], texts[REFERENCE:]
        whole = seen(model, texts[:1600])
        names = list(SHIFTS)[place :: len(runs)]
        found |= find_shifts(model, whole.take(np.arange(len(reference))), fresh, names)
        alarms += windows(model, whole, count // len(runs), 1600)
        for name in names:
            typer.echo(f"{artifact.recipe.name}: {name}: {', '.join(found[name]) or 'NOT FOUND'}")
    hit, wrong = sum(map(bool, found.values())), sum(map(bool, alarms))
    typer.echo(f"{hit} of {len(found)} shifts, {wrong} alarms in {len(alarms)} windows: {[a for a in alarms if a]}")
    if write:
        rows = [[name, ", ".join(looks) or "not found"] for name, looks in found.items()]
        summary = [
            ["planted shifts of use found", f"{hit} of {len(found)}", "18 of 20"],
            ["alarms in windows of the same source", f"{wrong} of {len(alarms)}", "at most 2 of 200"],
        ]
        keep(0, ["what", "found", "wanted"], summary)
        keep(1, ["planted shift", "looks that found it"], rows)


def keep(place: int, columns: list[str], rows: list[list[str]]) -> None:
    """Put a table in its place of the results file."""
    page: dict[str, Any] = {
        "title": "Drift of use, and A/B tests",
        "order": 12,
        "command": "python benchmarks/drift_of_use.py drift INT8_RUN TRIMMED_RUN --write",
        "tables": [],
    }
    if RESULTS.is_file():
        page = json.loads(RESULTS.read_text())
    tables = page["tables"]
    while len(tables) <= place:
        tables.append({"columns": ["what", "found", "wanted"], "rows": [], "notes": []})
    tables[place] |= {"columns": columns, "rows": rows}
    page |= {"measured": date.today().isoformat()}
    RESULTS.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
