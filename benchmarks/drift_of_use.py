"""Measure detections and false alarms of input drift, and error rates of A/B tests that are evaluated continuously.

    python benchmarks/drift_of_use.py drift RUN --half 0      # 10 planted shifts, 100 windows without a shift
    python benchmarks/drift_of_use.py ab RUN                  # a model against itself, and a loss of 3 points

The runs are those of `recipes/minilm-int8.yaml` and `recipes/quickstart.yaml`. The model is run once on every row, and
windows are samples of the rows. Shifts change the texts before the model reads them.
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

from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import predict
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import find_target
from compress.models.processor import load_processor
from compress.numerics.differences import difference_of_shares
from compress.pipeline.artifact import Artifact, find_artifact
from compress.plugins.monitoring.ab import judge_times, replay
from compress.plugins.monitoring.drift import LEVEL, judged, run_drift_tests
from compress.plugins.monitoring.hypothesis_tests import log_wealth
from compress.plugins.monitoring.outputs import ModelOutputs, ServedModel, observe
from compress.plugins.monitoring.rows import RowSample
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "drift-of-use.json"
REFERENCE, WINDOW, WINDOWS = 600, 200, 200
SAMPLED = 1600
"""Rows that references and windows are sampled from. Shifts are planted into the remaining rows."""
LOSS, DISAGREEMENT, BLOCK = 0.03, 0.10, 5
"""Loss of accuracy to detect, share of rows on which only one model is right, and requests per timing block."""
Change = Callable[[Sequence[str], random.Random], list[str]]
_WORDS = ("quark", "lepton", "hadron", "boson", "neutrino", "gluon", "photon", "baryon", "plasma", "tensor", "spinor")
_TYPOS = "abcdefghijklmnopqrstuvwxyz"


def _each(change: Callable[[str, random.Random], str], share: float = 1.0) -> Change:
    """Return a shift that changes each text, or a random ``share`` of them."""
    return lambda texts, chance: [change(text, chance) if chance.random() < share else text for text in texts]


def _typos(text: str, chance: random.Random, every: int = 12) -> str:
    replaced = [letter.isalpha() and chance.randrange(every) == 0 for letter in text]
    return "".join(chance.choice(_TYPOS) if typo else letter for typo, letter in zip(replaced, text, strict=True))


def _jargon(text: str, chance: random.Random, every: int = 8) -> str:
    return " ".join(chance.choice(_WORDS) if chance.randrange(every) == 0 else word for word in text.split())


def _insert(*words: str, every: int = 10) -> Callable[[str, random.Random], str]:
    """Return a change that inserts one of ``words`` after a word in ``every``."""

    def change(text: str, chance: random.Random) -> str:
        changed: list[str] = []
        for word in text.split():
            changed.append(word)
            if chance.randrange(every) == 0:
                changed.append(chance.choice(words))
        return " ".join(changed) or text

    return change


def _sorted_by(key: Callable[[str], float], share: float) -> Change:
    """Return a shift of the mix of rows: only the ``share`` with the largest ``key`` is selected."""
    return lambda texts, chance: sorted(texts, key=key, reverse=True)[: int(len(texts) * share)]


def _other_source(sample: str, file: str, column: str, share: float = 1.0) -> Change:
    """Return a shift that replaces a ``share`` of the rows by texts of another source."""

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
    "whole reviews from another page (snippets)": _other_source("snippets", "unlabeled.parquet", "text"),
    "Bible verses": _other_source("verses", "test.parquet", "text"),
    "half of the rows are Bible verses": _other_source("verses", "test.parquet", "text", 0.5),
    "Wikipedia's text": _other_source("wiki", "test.parquet", "text"),
    "typing errors, a letter in 12": _each(_typos),
    "typing errors in half of the rows": _each(_typos, 0.5),
    "physics in place of a word in 8": _each(_jargon),
    "physics in half of the rows": _each(_jargon, 0.5),
    "emoji behind a word in 10": _each(_insert("\U0001f600", "\U0001f4a9", "\U0001f3ac")),
    "Greek words": _each(_insert("\u03c4\u03b1\u03b9\u03bd\u03af\u03b1", "\u03ba\u03b1\u03bb\u03ae")),
    "HTML left in": _each(_insert("<br />", "<b>", "</b>", "&amp;", every=6)),
    "web addresses": _each(lambda text, chance: f"{text} https://t.co/{chance.randrange(10**9):x}"),
    "texts cut after 6 words": _each(lambda text, chance: " ".join(text.split()[:6])),
    "texts three times as long": _each(_repeat),
    "the first words only of half of the rows": _each(lambda text, chance: " ".join(text.split()[:6]), 0.5),
    "the longest third": _sorted_by(len, 1 / 3),
    "the shortest third": _sorted_by(lambda text: -len(text), 1 / 3),
    "capitals spaced out": _each(lambda text, chance: " ".join(text.upper().replace(" ", "_")), 0.3),
    "hashtags, words run together": _each(lambda text, chance: "#" + "".join(text.split()[:8]) + " " + text),
    "numbers behind a word in 6": _each(
        lambda text, chance: _insert(*(str(chance.randrange(10**6)) for _ in range(9)), every=6)(text, chance)
    ),
}


def load_run(run: Path) -> tuple[Artifact, ServedModel]:
    """Load the artifact of a run and its model."""
    artifact = find_artifact(run, None)
    return artifact, ServedModel(artifact.folder, artifact.recipe, artifact.task, find_target("cpu"))


def texts_of(artifact: Artifact) -> list[str]:
    """Return all held-out texts of the source, in random order."""
    data = artifact.dataset(SilentProgress())
    texts = [text for split in ("test", "validation") for text in data.split(split)["text"].to_pylist()]
    random.Random(0).shuffle(texts)
    return texts


def outputs_of(model: ServedModel, texts: Sequence[str]) -> ModelOutputs:
    """Run the model on every text and return all of its outputs."""
    return observe(model, RowSample("", pa.table({"text": list(texts)}), len(texts)), SilentProgress(), "", len(texts))


def detect_drift(model: ServedModel, reference: ModelOutputs, window: ModelOutputs) -> list[str]:
    """Return the names of the tests that detect drift."""
    tests = judged(run_drift_tests(model, reference, window), LEVEL, model.recipe)
    return [test.name for test in tests if test.verdict == "drift"]


def find_shifts(
    model: ServedModel, reference: ModelOutputs, texts: Sequence[str], shifts: Sequence[str]
) -> dict[str, list[str]]:
    """Return the tests that detect each shift, planted into a window of other rows."""
    detections = {}
    for name in shifts:
        chance = random.Random(name)
        # Sample three windows, since some shifts select among the rows.
        changed = SHIFTS[name](chance.sample(list(texts), min(len(texts), 3 * WINDOW)), chance)[:WINDOW]
        detections[name] = detect_drift(model, reference, outputs_of(model, changed))
    return detections


def alarms_without_shift(model: ServedModel, outputs: ModelOutputs, count: int, rows: int) -> list[list[str]]:
    """Return the tests that wrongly detect drift in ``count`` disjoint pairs of reference and window of one source."""
    alarms = []
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(rows)
        reference, window = np.sort(order[:REFERENCE]), np.sort(order[REFERENCE : REFERENCE + WINDOW])
        alarms.append(detect_drift(model, outputs.take(reference), outputs.take(window)))
    return alarms


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _choose() -> None:
    """Measure drift detection or A/B tests."""


@app.command()
def drift(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    half: Annotated[int, typer.Option(min=0, max=1, help="Half of the shifts to test.")] = 0,
    count: Annotated[int, typer.Option(help="Windows without a shift.")] = WINDOWS // 2,
    write: Annotated[bool, typer.Option("--write", help="Write the results into benchmarks/results.")] = False,
) -> None:
    """Measure detected shifts and false alarms of a run."""
    quiet_libraries()
    artifact, model = load_run(run)
    texts = texts_of(artifact)
    outputs = outputs_of(model, texts[:SAMPLED])
    detections = find_shifts(model, outputs.take(np.arange(REFERENCE)), texts[SAMPLED:], list(SHIFTS)[half::2])
    for name, tests in detections.items():
        typer.echo(f"{name}: {', '.join(tests) or 'NOT FOUND'}")
    alarms = [tests for tests in alarms_without_shift(model, outputs, count, SAMPLED) if tests]
    detected = sum(map(bool, detections.values()))
    typer.echo(f"{detected} of {len(detections)} shifts, {len(alarms)} false alarms of {count}: {alarms}")
    if write:
        write_drift(artifact.recipe.name, detections, len(alarms), count)


@app.command()
def ab(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    trials: Annotated[int, typer.Option(help="Number of tests of a model against itself.")] = 200,
    write: Annotated[bool, typer.Option("--write", help="Write the results into benchmarks/results.")] = False,
) -> None:
    """Measure wrong verdicts of a model against itself, and requests until a loss is detected."""
    quiet_libraries()
    artifact, model = load_run(run)
    right, examples = outcomes(artifact, model)
    wrong = [against_itself(right, number) for number in range(trials)]
    anytime, fixed = (sum(counts[index] for counts in wrong) for index in (0, 1))
    times = times_against_itself(model, examples, trials)
    needed = np.array([requests_until_detected(right, number) for number in range(trials)])
    rows = [
        [
            "wrong verdicts on answers, model against itself, 1,000 requests, tested after each",
            f"{anytime} of {trials}",
            "at most 10",
        ],
        ["the same with a fixed-size interval", f"{fixed} of {trials}", ""],
        *([f"wrong verdicts on {name}", f"{count} of {trials}", "at most 10"] for name, count in times.items()),
        [f"requests until a loss of {LOSS:.0%} is detected, median", f"{np.quantile(needed, 0.5):,.0f}", ""],
        ["the same, 80% of runs", f"{np.quantile(needed, 0.8):,.0f}", ""],
        ["requests that a fixed-size test needs for 80%", f"{fixed_size():,}", ""],
    ]
    for row in rows:
        typer.echo(": ".join(row[:2]))
    if write:
        write_table(read_page(), 2, ["comparison", "measured", "required"], rows)


def outcomes(artifact: Artifact, model: ServedModel) -> tuple[np.ndarray, Examples]:
    """Return on which held-out rows the model is right, and the encoded rows."""
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
    """Return whether the anytime and the fixed-size interval ever call a model better or worse than itself."""
    pairs = np.random.default_rng(seed).permutation(right)[: 2 * requests].reshape(requests, 2)
    wins, losses = (np.cumsum(pairs[:, column] & ~pairs[:, 1 - column]) for column in (1, 0))
    counts = list(zip(wins.tolist(), losses.tolist(), range(1, requests + 1), strict=True))
    # The anytime interval excludes 0 as soon as the wealth against 0 reaches 1 / 5%.
    anytime = any(log_wealth(won, lost, n - won - lost, 0.0) >= math.log(20) for won, lost, n in counts)
    intervals = (difference_of_shares(lost, won, n, 0.95) for won, lost, n in counts)
    return anytime, any(interval.low > 0 or interval.high < 0 for interval in intervals)


def requests_until_detected(right: np.ndarray, seed: int, most: int = 20_000) -> int:
    """Return after how many requests B is called worse, if it loses `LOSS` of accuracy net with `DISAGREEMENT`."""
    chance = np.random.default_rng(seed)
    sampled, uniform, accuracy = chance.choice(right, most), chance.random(most), float(right.mean())
    lost = np.cumsum(sampled & (uniform < (DISAGREEMENT + LOSS) / 2 / accuracy))
    won = np.cumsum(~sampled & (uniform < (DISAGREEMENT - LOSS) / 2 / (1 - accuracy)))
    for n, (wins, losses) in enumerate(zip(won.tolist(), lost.tolist(), strict=True), start=1):
        if wins < losses and log_wealth(wins, losses, n - wins - losses, 0.0) >= math.log(20):
            return n
    return most


def fixed_size() -> int:
    """Return the pairs needed for a power of 80% at a level of 5%, two-sided (Connor 1987, equation 3)."""
    normal = NormalDist()
    level = normal.inv_cdf(0.975) * math.sqrt(DISAGREEMENT)
    power = normal.inv_cdf(0.8) * math.sqrt(DISAGREEMENT - LOSS**2)
    return math.ceil(((level + power) / LOSS) ** 2)


def times_against_itself(model: ServedModel, examples: Examples, trials: int) -> dict[str, int]:
    """Count how often a model is called faster or slower than itself, after up to 16 blocks of 5 requests each."""
    subset = examples.subset(range(BLOCK * 20))
    blocks = [range(BLOCK * (index % 20), BLOCK * (index % 20 + 1)) for index in range(16 * trials)]
    arrivals = np.cumsum(np.random.default_rng(0).exponential(0.004, len(subset)))
    models, inputs = {"A": model, "B": model}, {"A": subset, "B": subset}
    served = [timings for _, timings in replay(models, inputs, arrivals, 1.0, 0, SilentProgress(), blocks)]
    wrong: dict[str, int] = {}
    for number in range(trials):
        for verdict in judge_times(served[16 * number : 16 * number + 16], 0.05, margin=0.0):
            wrong[verdict.name] = wrong.get(verdict.name, 0) + (verdict.verdict in ("better", "worse"))
    return wrong


def write_drift(run: str, detections: dict[str, list[str]], alarms: int, count: int) -> None:
    """Write the results of a run together with those of the other runs."""
    page = read_page()
    page["runs"] = page.get("runs", {}) | {run: {"found": detections, "alarms": [alarms, count]}}
    runs = page["runs"].values()
    shifts = {name: tests for run_page in runs for name, tests in run_page["found"].items()}
    all_alarms, windows = (sum(run_page["alarms"][index] for run_page in runs) for index in (0, 1))
    detected = sum(map(bool, shifts.values()))
    summary = [
        ["planted shifts of use found, windows of 200 rows", f"{detected} of {len(shifts)}", "18 of 20"],
        ["alarms in windows of the same source", f"{all_alarms} of {windows}", "at most 2 of 200"],
    ]
    write_table(page, 0, ["quantity", "measured", "required"], summary)
    rows = [
        [name, run, ", ".join(tests)]
        for run, run_page in page["runs"].items()
        for name, tests in run_page["found"].items()
    ]
    write_table(page, 1, ["planted shift", "model", "tests that detected it"], rows)


def read_page() -> dict[str, Any]:
    """Return the stored results, or an empty page."""
    if RESULTS.is_file():
        page: dict[str, Any] = json.loads(RESULTS.read_text())
        return page
    return {
        "title": "Input drift and A/B tests",
        "order": 12,
        "command": "python benchmarks/drift_of_use.py drift RUN --write",
        "tables": [],
    }


def write_table(page: dict[str, Any], index: int, columns: list[str], rows: list[list[str]]) -> None:
    """Replace a table of the results file."""
    tables = page["tables"]
    while len(tables) <= index:
        tables.append({"columns": ["quantity", "measured", "required"], "rows": [], "notes": []})
    tables[index] |= {"columns": columns, "rows": rows}
    page["measured"] = date.today().isoformat()
    RESULTS.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
