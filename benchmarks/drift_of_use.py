"""Whether drift of use is found and not imagined, and whether an A/B test may be looked at after every request.

    python benchmarks/drift_of_use.py drift RUN --half 0      # 10 planted shifts, 100 windows of one source
    python benchmarks/drift_of_use.py ab RUN                  # a model against itself, and a loss of 3 points

The runs are of `recipes/minilm-int8.yaml` and `recipes/quickstart.yaml`. Everything that the looks need is seen once of
every row; a window is some of the rows. Shifts are planted into the rows themselves, before the model sees them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from compress.cli.artifact import Artifact, find_artifact
from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import predict
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import find_target
from compress.models.processor import load_processor
from compress.numerics.differences import difference_of_shares
from compress.numerics.hypothesis_tests import log_wealth
from compress.plugins.monitoring.ab import judge_times, replay
from compress.plugins.monitoring.drift import LEVEL, judged, run_drift_tests
from compress.plugins.monitoring.outputs import ModelOutputs, ServedModel, observe
from compress.plugins.monitoring.rows import RowSample
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "drift-of-use.json"
REFERENCE, WINDOW, WINDOWS = 600, 200, 200
SEEN = 1600
"""Rows that references and windows are drawn from; what shifts are planted into are others."""
LOSS, PARTED, STRETCH = 0.03, 0.10, 5
TEN = "at most 10 of 200"
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
        changed: list[str] = []
        for word in text.split():
            changed.append(word)
            if chance.randrange(every) == 0:
                changed.append(chance.choice(words))
        return " ".join(changed) or text

    return change


def _sorted_by(key: Callable[[str], float], share: float) -> Change:
    """The rows of the largest ``key`` of a larger draw, so that some of the source come more often."""
    return lambda texts, chance: sorted(texts, key=key, reverse=True)[: int(len(texts) * share)]


def _others(sample: str, file: str, column: str, share: float = 1.0) -> Change:
    """Texts of another source in place of a ``share`` of the rows."""

    def change(texts: Sequence[str], chance: random.Random) -> list[str]:
        import pyarrow.parquet as parquet

        other_texts = parquet.read_table(sample_directory(sample) / file)[column].to_pylist()
        pieces = [text[start : start + 200] for text in other_texts for start in range(0, min(len(text), 2000), 200)]
        chosen = chance.choices([piece for piece in pieces if piece.strip()], k=len(texts))
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


def opened(run: Path) -> tuple[Artifact, ServedModel]:
    """A run, ready to be looked at."""
    artifact = find_artifact(run, None)
    return artifact, ServedModel(artifact.folder, artifact.recipe, artifact.task, find_target("cpu"))


def texts_of(artifact: Artifact) -> list[str]:
    """All held-out rows of the source, in a random order."""
    data = artifact.dataset(SilentProgress())
    texts = [text for split in ("test", "validation") for text in data.split(split)["text"].to_pylist()]
    random.Random(0).shuffle(texts)
    return texts


def seen(model: ServedModel, texts: Sequence[str]) -> ModelOutputs:
    """Everything of every row."""
    return observe(model, RowSample("", pa.table({"text": list(texts)}), len(texts)), SilentProgress(), "", len(texts))


def drifts(model: ServedModel, before: ModelOutputs, now: ModelOutputs) -> list[str]:
    """Names of the looks that drifted."""
    looks = judged(run_drift_tests(model, before, now), LEVEL, model.recipe)
    return [look.name for look in looks if look.verdict == "drift"]


def find_shifts(
    model: ServedModel, before: ModelOutputs, texts: Sequence[str], shifts: Sequence[str]
) -> dict[str, list[str]]:
    """What is found of each planted shift of fresh rows."""
    detections = {}
    for name in shifts:
        chance = random.Random(name)
        # What chooses among rows has more to choose from.
        changed = SHIFTS[name](chance.sample(list(texts), min(len(texts), 3 * WINDOW)), chance)[:WINDOW]
        detections[name] = drifts(model, before, seen(model, changed))
    return detections


def windows(model: ServedModel, whole: ModelOutputs, count: int, rows: int) -> list[list[str]]:
    """What is imagined in windows of the same source, each with a reference of its own, of ``rows`` rows."""
    chosen_rows = []
    for number in range(count):
        order = np.random.default_rng(number).permutation(rows)
        reference_rows, now = order[:REFERENCE], order[REFERENCE : REFERENCE + WINDOW]
        chosen_rows.append(drifts(model, whole.take(np.sort(reference_rows)), whole.take(np.sort(now))))
    return chosen_rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _choose() -> None:
    """Which part of it."""


@app.command()
def drift(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    half: Annotated[int, typer.Option(min=0, max=1, help="Which half of the shifts.")] = 0,
    count: Annotated[int, typer.Option(help="Windows of the same source.")] = WINDOWS // 2,
    write: Annotated[bool, typer.Option("--write", help="Keep the figures in benchmarks/results.")] = False,
) -> None:
    """Shifts found, and alarms without any, of one run."""
    quiet_libraries()
    artifact, model = opened(run)
    texts = texts_of(artifact)
    whole = seen(model, texts[:SEEN])
    detections = find_shifts(model, whole.take(np.arange(REFERENCE)), texts[SEEN:], list(SHIFTS)[half::2])
    for name, looks in detections.items():
        typer.echo(f"{name}: {', '.join(looks) or 'NOT FOUND'}")
    alarms = windows(model, whole, count, SEEN)
    wrong = [looks for looks in alarms if looks]
    typer.echo(
        f"{sum(map(bool, detections.values()))} of {len(detections)} shifts, {len(wrong)} alarms of {count}: {wrong}"
    )
    if write:
        keep_drift(artifact.recipe.name, detections, len(wrong), count)


@app.command()
def ab(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    trials: Annotated[int, typer.Option(help="A model against itself so many times.")] = 200,
    write: Annotated[bool, typer.Option("--write", help="Keep the figures in benchmarks/results.")] = False,
) -> None:
    """Wrong verdicts of a model against itself, looked at after every request, and requests until a loss is found."""
    quiet_libraries()
    artifact, model = opened(run)
    right, examples = outcomes(artifact, model)
    wrong = [against_itself(right, number) for number in range(trials)]
    anytime, fixed = (sum(counts[index] for counts in wrong) for index in (0, 1))
    times = times_against_itself(model, examples, trials)
    needed = np.array([requests_until_found(right, number) for number in range(trials)])
    rows = [
        ["answers of a model against itself, 1,000 requests, looked at after each", f"{anytime} of {trials}", TEN],
        ["the same with the interval of a test of fixed size", f"{fixed} of {trials}", "\u2013"],
        *([f"{name} of a model against itself", f"{count} of {trials}", TEN] for name, count in times.items()),
        [
            f"requests until a loss of {LOSS:.0%} is found, both parting on {PARTED:.0%}",
            f"half of all times after {np.quantile(needed, 0.5):,.0f}, 80% after {np.quantile(needed, 0.8):,.0f}",
            "\u2013",
        ],
        ["requests that a test of fixed size needs to find it 80% of the time", f"{fixed_size():,}", "\u2013"],
    ]
    for row in rows:
        typer.echo(": ".join(row[:2]))
    if write:
        keep(read_page(), 2, ["comparison", "measured", "required"], rows)


def outcomes(artifact: Artifact, model: ServedModel) -> tuple[np.ndarray, Examples]:
    """Which of all held-out rows the model gets right, and the rows as it reads them."""
    data = artifact.dataset(SilentProgress())
    tables = [data.split(split) for split in ("test", "validation")]
    examples = model.task.encode(
        pa.concat_tables(tables), load_processor(model.folder), data.labels, artifact.recipe.data.max_length
    )
    outputs = predict(model.folder, model.task, examples, model.target, 1, SilentProgress(), "").kept
    probabilities = model.task.probabilities(outputs)
    assert probabilities is not None and examples.labels is not None
    return probabilities.argmax(axis=1) == examples.labels, examples


def against_itself(right: np.ndarray, seed: int, requests: int = 1000) -> tuple[bool, bool]:
    """Whether a model that answers other rows as A than as B is ever called better or worse, by either interval."""
    drawn = np.random.default_rng(seed).permutation(right)[: 2 * requests].reshape(requests, 2)
    wins, losses = (np.cumsum(drawn[:, column] & ~drawn[:, 1 - column]) for column in (1, 0))
    counts = list(zip(wins.tolist(), losses.tolist(), range(1, requests + 1), strict=True))
    # An interval leaves 0 out where 0 is refuted.
    anytime = any(log_wealth(won, lost, n - won - lost, 0.0) >= math.log(20) for won, lost, n in counts)
    intervals = (difference_of_shares(lost, won, n, 0.95) for won, lost, n in counts)
    return anytime, any(interval.low > 0 or interval.high < 0 for interval in intervals)


def requests_until_found(right: np.ndarray, seed: int, most: int = 20_000) -> int:
    """After how many requests B is worse that loses some right answers and makes up for a part of them."""
    chance = np.random.default_rng(seed)
    drawn, luck, share = chance.choice(right, most), chance.random(most), float(right.mean())
    lost = np.cumsum(drawn & (luck < (PARTED + LOSS) / 2 / share))
    won = np.cumsum(~drawn & (luck < (PARTED - LOSS) / 2 / (1 - share)))
    for n, (wins, losses) in enumerate(zip(won.tolist(), lost.tolist(), strict=True), start=1):
        if wins < losses and log_wealth(wins, losses, n - wins - losses, 0.0) >= math.log(20):
            return n
    return most


def fixed_size() -> int:
    """Pairs for a power of 80% at 5%, two-sided (Connor 1987, equation 3)."""
    normal = NormalDist()
    ends = normal.inv_cdf(0.975) * math.sqrt(PARTED) + normal.inv_cdf(0.8) * math.sqrt(PARTED - LOSS**2)
    return math.ceil((ends / LOSS) ** 2)


def times_against_itself(model: ServedModel, examples: Examples, trials: int) -> dict[str, int]:
    """How often a model is called faster or slower than itself, each time after up to 16 stretches of 5 requests."""
    few = examples.subset(range(STRETCH * 20))
    parts = [range(STRETCH * (number % 20), STRETCH * (number % 20 + 1)) for number in range(16 * trials)]
    at = np.cumsum(np.random.default_rng(0).exponential(0.004, len(few)))
    both = {"A": model, "B": model}
    served = [timings for _, timings in replay(both, {"A": few, "B": few}, at, 1.0, 0, SilentProgress(), parts)]
    wrong: dict[str, int] = {}
    for number in range(trials):
        for verdict in judge_times(served[16 * number : 16 * number + 16], 0.05, margin=0.0):
            wrong[verdict.name] = wrong.get(verdict.name, 0) + (verdict.verdict in ("better", "worse"))
    return wrong


def keep_drift(run: str, found: dict[str, list[str]], wrong: int, count: int) -> None:
    """Put the figures of a run beside those of the others."""
    page = read_page()
    page["runs"] = page.get("runs", {}) | {run: {"found": found, "alarms": [wrong, count]}}
    runs = page["runs"].values()
    shifts = {name: looks for run_page in runs for name, looks in run_page["found"].items()}
    alarms, of = (sum(run_page["alarms"][index] for run_page in runs) for index in (0, 1))
    hit = sum(map(bool, shifts.values()))
    summary = [
        ["planted shifts of use found, windows of 200 rows", f"{hit} of {len(shifts)}", "18 of 20"],
        ["alarms in windows of the same source", f"{alarms} of {of}", "at most 2 of 200"],
    ]
    keep(page, 0, ["quantity", "measured", "required"], summary)
    rows = [
        [name, run, ", ".join(looks)]
        for run, run_page in page["runs"].items()
        for name, looks in run_page["found"].items()
    ]
    keep(page, 1, ["planted shift", "model", "looks that found it"], rows)


def read_page() -> dict[str, Any]:
    """What was kept, or a page with nothing on it."""
    if RESULTS.is_file():
        page: dict[str, Any] = json.loads(RESULTS.read_text())
        return page
    return {
        "title": "Drift of use, and A/B tests",
        "order": 12,
        "command": "python benchmarks/drift_of_use.py drift RUN --write",
        "tables": [],
    }


def keep(page: dict[str, Any], place: int, columns: list[str], rows: list[list[str]]) -> None:
    """Put a table in its place of the results file."""
    tables = page["tables"]
    while len(tables) <= place:
        tables.append({"columns": ["quantity", "measured", "required"], "rows": [], "notes": []})
    tables[place] |= {"columns": columns, "rows": rows}
    page["measured"] = date.today().isoformat()
    RESULTS.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
