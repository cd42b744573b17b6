"""Whether today's inputs are still what a model was compressed for: a few looks, each a test, corrected together.

Which tests find such shifts, and that the model's own answers are a good place to look: Rabanser, Günnemann and Lipton
2019, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.inspection.activation_clipping import RowActivations
from compress.models.processor import load_tokenizer
from compress.numerics.two_samples import (
    Tested,
    class_shares,
    gaussian_kernel,
    grown_means,
    holm,
    kolmogorov_smirnov,
    mean_discrepancy,
)
from compress.plugins.monitoring.advice import advice_of
from compress.plugins.monitoring.outputs import Model, ModelOutputs, observe
from compress.plugins.monitoring.record import DriftTest, ChangedPart, RowSource, DriftReport, Verdict
from compress.plugins.monitoring.rows import Sample
from compress.plugins.monitoring.features import TextFeatures
from compress.recipe.recipe import Recipe
from compress.tasks.capability import READS_ROWS
from compress.utils.errors import InputError
from compress.utils.progress import Progress

LEVEL = 0.005
"""Of one comparison a day, one in seven months finds a drift where there is none."""
_QUANTILES = 41
_MOST_PARTS = 12
_LEAST = 1e-9
_FAMILIAR = frozenset({"unknown", "words", "confidence"})
"""Looks that tell nothing beside rows of training: the model knows their words and is sure of them."""


class Kind(NamedTuple):
    """A test: its name for people, what its effect is, and from which effect on a drift matters."""

    test: str
    effect_is: str
    matters_from: float


_SPREAD = "distance of the means in standard deviations"
KS = Kind("Kolmogorov-Smirnov", "greatest distance of the distribution functions", 0.1)
MEAN = Kind("permutations of the mean, one-sided", _SPREAD, 0.2)
MOST = Kind("permutations of the mean, one-sided, the largest of all layers", _SPREAD, 0.2)
CHI = Kind("permutations of chi-square", "Cohen's w", 0.1)
MMD = Kind("permutations of the maximum mean discrepancy", "share of the spread", 0.002)

_TITLES = {
    "unknown": "unknown tokens",
    "words": "words outside the table",
    "tokens": "which tokens occur",
    "length": "length of the texts",
    "cut": "text cut off",
    "confidence": "confidence",
    "classes": "shares of the classes",
    "embeddings": "embeddings",
    "ranges": "activation ranges",
    "brightness": "brightness",
    "contrast": "contrast",
    "size": "size of the images",
    "loudness": "loudness",
    "seconds": "length of the recordings",
    "rate": "sampling rate",
    "clipped": "samples at full scale",
}
_UNITS = {"loudness": "dB", "seconds": "s", "rate": "Hz", "size": "pixels"}


@dataclass
class DriftTests:
    """The looks at a model's use, as they are made."""

    model: Model
    found: list[DriftTest] = field(default_factory=list)

    def add(self, name: str, kind: Kind, tested: Tested, **more: Any) -> None:
        """Add a look that was tested."""
        values = {"name": name, "title": _TITLES[name], "verdict": "none", **kind._asdict(), **tested._asdict(), **more}
        self.found.append(DriftTest(**values))

    def spread(self, name: str, kind: Kind, tested: Tested, before: np.ndarray, now: np.ndarray, **more: Any) -> None:
        """Add one at numbers of rows [n] and [m], of which the means are told and the distribution is drawn."""
        steps = np.linspace(0, 1, _QUANTILES)
        quantiles = tuple(np.quantile(before, steps).tolist()), tuple(np.quantile(now, steps).tolist())
        values = {"reference": float(np.mean(before)), "recent": float(np.mean(now)), "quantiles": quantiles}
        self.add(name, kind, tested, **(values | more))

    def shares(self, name: str, before: np.ndarray, now: np.ndarray, **more: Any) -> None:
        """Whether shares of rows grew."""
        tested = grown_means(before, now, self.seed)
        whole = Tested(float(tested.effects[0]), float(tested.p_values[0]))
        self.spread(name, MEAN, whole, before, now, unit="ratio", **more)

    def numbers(self, name: str, before: np.ndarray, now: np.ndarray, unit: str) -> None:
        """Whether numbers of rows have another distribution."""
        self.spread(name, KS, kolmogorov_smirnov(before, now), before, now, unit=unit)

    @property
    def seed(self) -> int:
        """Of permutations."""
        return self.model.recipe.seed


def find_drift(
    model: Model, reference: Sample, recent: Sample, progress: Progress, level: float = LEVEL, name: str = ""
) -> DriftReport:
    """Make every look that the task and the format allow, and judge them together. Raises what those raise."""
    before = observe(model, reference, progress, "reference")
    now = observe(model, recent, progress, "recent")
    looks = run_drift_tests(model, before, now)
    if not any(look.test for look in looks):
        raise InputError(
            f"There is nothing to look at in inputs of {model.task.name}.",
            expected="texts, images, recordings, classes",
        )
    notes = []
    if reference.taught:
        notes.append(
            f"{reference.name} are rows that the model was trained on: it knows their words and is surer of them than "
            "of any others, so these looks are left out; name rows that no stage has seen, such as the test split"
        )
    return DriftReport(
        artifact=name or str(model.folder),
        task=model.task.name,
        reference=_side(reference),
        recent=_side(recent),
        level=level,
        looks=judged(looks, level, model.recipe, reference.taught),
        notes=tuple(notes),
    )


def run_drift_tests(model: Model, before: ModelOutputs, now: ModelOutputs) -> list[DriftTest]:
    """Every look that both sides allow, tested but not yet judged."""
    looks = DriftTests(model)
    if before.text is not None and now.text is not None:
        _look_at_text(looks, before.text, now.text)
    for name in before.media:
        if name == "clipped":
            looks.shares(name, before.media[name], now.media[name])
        else:
            looks.numbers(name, before.media[name], now.media[name], _UNITS.get(name, ""))
    if before.probabilities is not None and now.probabilities is not None:
        _look_at_classes(looks, before.probabilities, now.probabilities)
    if before.embeddings is not None and now.embeddings is not None:
        rows = np.concatenate([before.embeddings, now.embeddings])
        looks.add("embeddings", MMD, mean_discrepancy(gaussian_kernel(rows), len(before.embeddings), looks.seed))
    if before.activations is not None and now.activations is not None:
        _look_at_ranges(looks, before.activations, now.activations)
    return looks.found + [
        DriftTest(name=name, title=_TITLES[name], verdict="not judged", why=why) for name, why in before.lacking.items()
    ]


def judged(looks: Sequence[DriftTest], level: float, recipe: Recipe, taught: bool = False) -> tuple[DriftTest, ...]:
    """The looks with their verdicts: a p-value below ``level`` when all are corrected, and an effect that matters."""
    left_out = {"verdict": "not judged", "why": "the reference is rows of training"}
    looks = [look.model_copy(update=left_out) if taught and look.name in _FAMILIAR else look for look in looks]
    tested = [look for look in looks if look.verdict != "not judged"]
    adjusted = dict(zip((look.name for look in tested), holm([look.p_value or 0.0 for look in tested]), strict=True))
    return tuple(
        _judged(look, float(adjusted[look.name]), level, recipe) if look.name in adjusted else look for look in looks
    )


def _judged(look: DriftTest, adjusted: float, level: float, recipe: Recipe) -> DriftTest:
    verdict: Verdict = "none"
    if adjusted <= level:
        verdict = "drift" if (look.effect or 0.0) >= (look.matters_from or 0.0) else "small"
    advice = advice_of(look, recipe) if verdict == "drift" else ""
    return look.model_copy(update={"adjusted": adjusted, "verdict": verdict, "advice": advice})


def _side(sample: Sample) -> RowSource:
    return RowSource(name=sample.name, rows=len(sample), total=sample.total)


def _look_at_text(looks: DriftTests, before: TextFeatures, now: TextFeatures) -> None:
    if before.unknown is not None and now.unknown is not None:
        looks.shares("unknown", before.unknown, now.unknown)
    shares = [_word_shares(side) for side in (before, now)]
    new = sorted(shares[1], key=lambda word: (shares[0].get(word, 0.0) - shares[1][word], word))[:_MOST_PARTS]
    parts = tuple(ChangedPart(name=word, reference=shares[0].get(word, 0.0), recent=shares[1][word]) for word in new)
    looks.shares("words", before.broken, now.broken, parts=parts)
    if READS_ROWS in looks.model.task.capabilities:
        looks.numbers("length", before.lengths, now.lengths, "tokens")
        looks.shares("cut", before.cut, now.cut)
    _look_at_tokens(looks, before.tokens, now.tokens)


def _word_shares(side: TextFeatures) -> dict[str, float]:
    """In which share of rows each word is that is no entry of the table."""
    found: dict[str, float] = {}
    for words in side.words:
        for word in words:
            found[word] = found.get(word, 0.0) + 1 / len(side.words)
    return found


def _look_at_tokens(looks: DriftTests, before: Any, now: Any) -> None:
    """By the square roots of the tokens' shares of each row, whose products are Bhattacharyya's coefficient."""
    from scipy.sparse import vstack

    counts = vstack([before, now]).tocsr()
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    rows = counts.multiply(1 / totals[:, None]).tocsr()
    rows.data = np.sqrt(rows.data)
    tested = mean_discrepancy((rows @ rows.T).toarray(), before.shape[0], looks.seed)
    shares = [np.asarray((side > 0).mean(axis=0)).ravel() for side in (before, now)]
    most = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:_MOST_PARTS]
    words = load_tokenizer(looks.model.folder).convert_ids_to_tokens(most.tolist())
    looks.add("tokens", MMD, tested, parts=_parts(words, most, shares))


def _parts(names: Sequence[str], places: np.ndarray, shares: Sequence[np.ndarray]) -> tuple[ChangedPart, ...]:
    return tuple(
        ChangedPart(name=str(name), reference=float(shares[0][place]), recent=float(shares[1][place]))
        for name, place in zip(names, places, strict=True)
    )


def _look_at_classes(looks: DriftTests, before: np.ndarray, now: np.ndarray) -> None:
    looks.numbers("confidence", before.max(axis=1), now.max(axis=1), "ratio")
    width = before.shape[1]
    if width < 2:
        return
    chosen = before.argmax(axis=1), now.argmax(axis=1)
    names = artifact_labels(looks.model.folder) or tuple(map(str, range(width)))
    shares = [np.bincount(each, minlength=width) / len(each) for each in chosen]
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:_MOST_PARTS]
    tested = class_shares(*chosen, width, looks.seed)
    looks.add("classes", CHI, tested, parts=_parts([names[place] for place in order], order, shares))


def _look_at_ranges(looks: DriftTests, before: RowActivations, now: RowActivations) -> None:
    """What static INT8 cuts off, or of other graphs whether activations grew beyond the reference's."""
    stored = before.ranges[0].stored
    values = [each.cut if stored else np.log(np.maximum(each.peaks, _LEAST)) for each in (before, now)]
    tested = grown_means(values[0], values[1], looks.seed)
    # Of equal p-values the larger effect first.
    order = np.lexsort([-tested.effects, tested.p_values])
    shown = [each.mean(axis=0) if stored else np.exp(each.mean(axis=0)) for each in values]
    parts = tuple(
        ChangedPart(
            name=before.ranges[place].layer,
            reference=float(shown[0][place]),
            recent=float(shown[1][place]),
            note=_range_note(before, now, place),
            p_value=float(tested.p_values[place]),
        )
        for place in order[:_MOST_PARTS]
    )
    worst = int(order[0])
    whole = Tested(float(tested.effects[worst]), float(tested.p_values[worst]))
    rows = [each[:, worst] if stored else np.exp(each[:, worst]) for each in values]
    looks.spread("ranges", MOST, whole, rows[0], rows[1], unit="ratio" if stored else "", parts=parts)


def _range_note(before: RowActivations, now: RowActivations, place: int) -> str:
    """By how much values are cut off: what the integers stand for, and how far out values were."""
    own = before.ranges[place]
    outer = [f"{each.least[:, place].min():.3g} to {each.greatest[:, place].max():.3g}" for each in (before, now)]
    seen = f"seen {outer[0]} before, {outer[1]} now"
    return f"8 bits stand for {own.low:.3g} to {own.high:.3g}; {seen}" if own.stored else seen
