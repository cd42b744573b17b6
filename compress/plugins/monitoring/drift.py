"""Drift of a model's inputs: several two-sample tests whose p-values are corrected together.

Rabanser, Günnemann and Lipton 2019, section 4, compare such tests and recommend the model's own outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.inspection.activation_clipping import RowActivations
from compress.models.processor import load_tokenizer
from compress.numerics.hypothesis_tests import (
    Tested,
    class_shares,
    gaussian_kernel,
    grown_means,
    holm,
    kolmogorov_smirnov,
    mean_discrepancy,
)
from compress.plugins.monitoring.advice import advice_of
from compress.plugins.monitoring.features import TextFeatures
from compress.plugins.monitoring.outputs import Model, ModelOutputs, observe
from compress.plugins.monitoring.record import ChangedPart, DriftReport, DriftTest, RowSource, Verdict
from compress.plugins.monitoring.rows import Sample
from compress.recipe.recipe import Recipe
from compress.tasks.capability import READS_ROWS
from compress.utils.errors import InputError
from compress.utils.progress import Progress

LEVEL = 0.005
"""Probability that one comparison reports a drift where there is none: one in seven months of daily comparisons."""
_QUANTILES = 41
_MOST_PARTS = 12
_LEAST = 1e-9
_FAMILIAR = frozenset({"unknown", "words", "confidence"})
"""Tests that are meaningless against training rows, whose words the model knows and of which it is sure."""


class Kind(NamedTuple):
    """Statistical test: its name, the meaning of its effect, and the effect from which a drift matters."""

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
    """Tests of one comparison, collected as they are computed."""

    model: Model
    found: list[DriftTest] = field(default_factory=list)

    def add(self, name: str, kind: Kind, tested: Tested, **more: Any) -> None:
        """Add a computed test.

        Args:
            name: Name of the tested feature.
            kind: The statistical test.
            tested: Effect and p-value.
            **more: Further fields of `DriftTest`.
        """
        values = {"name": name, "title": _TITLES[name], "verdict": "none", **kind._asdict(), **tested._asdict(), **more}
        self.found.append(DriftTest(**values))

    def spread(self, name: str, kind: Kind, tested: Tested, before: np.ndarray, now: np.ndarray, **more: Any) -> None:
        """Add a test of numbers [n] and [m], with their means and quantiles.

        Args:
            name: Name of the tested feature.
            kind: The statistical test.
            tested: Effect and p-value.
            before: Numbers of the reference rows.
            now: Numbers of the recent rows.
            **more: Further fields of `DriftTest`.
        """
        steps = np.linspace(0, 1, _QUANTILES)
        quantiles = tuple(np.quantile(before, steps).tolist()), tuple(np.quantile(now, steps).tolist())
        values = {"reference": float(np.mean(before)), "recent": float(np.mean(now)), "quantiles": quantiles}
        self.add(name, kind, tested, **(values | more))

    def shares(self, name: str, before: np.ndarray, now: np.ndarray, **more: Any) -> None:
        """Test whether shares per row have grown.

        Args:
            name: Name of the tested feature.
            before: Shares of the reference rows.
            now: Shares of the recent rows.
            **more: Further fields of `DriftTest`.
        """
        tested = grown_means(before, now, self.seed)
        whole = Tested(float(tested.effects[0]), float(tested.p_values[0]))
        self.spread(name, MEAN, whole, before, now, unit="ratio", **more)

    def numbers(self, name: str, before: np.ndarray, now: np.ndarray, unit: str) -> None:
        """Test whether numbers per row have another distribution.

        Args:
            name: Name of the tested feature.
            before: Numbers of the reference rows.
            now: Numbers of the recent rows.
            unit: Unit of the numbers.
        """
        self.spread(name, KS, kolmogorov_smirnov(before, now), before, now, unit=unit)

    @property
    def seed(self) -> int:
        """Return the seed of permutations."""
        return self.model.recipe.seed


def find_drift(
    model: Model, reference: Sample, recent: Sample, progress: Progress, level: float = LEVEL, name: str = ""
) -> DriftReport:
    """Run every test that the task and the format allow, and judge them together.

    Args:
        model: Model in use.
        reference: Rows that the model was compressed for.
        recent: Recent rows.
        progress: Shows the evaluation of the model.
        level: Probability that any test reports a drift where there is none.
        name: Name of the model in the report.

    Returns:
        The report.

    Raises:
        InputError: Nothing can be tested for the task.
    """
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
    """Run every test that both sides allow, without a verdict."""
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
    """Return the tests with verdicts: a drift has a corrected p-value below ``level`` and an effect that matters.

    Args:
        looks: Tests without verdicts.
        level: Probability of a false drift among all tests.
        recipe: Recipe of the model, for the advice.
        taught: The reference consists of training rows.
    """
    left_out = {"verdict": "not judged", "why": "the reference is rows of training"}
    looks = [look.model_copy(update=left_out) if taught and look.name in _FAMILIAR else look for look in looks]
    tested = [look for look in looks if look.verdict != "not judged"]
    adjusted = dict(zip((look.name for look in tested), holm([look.p_value or 0.0 for look in tested]), strict=True))
    return tuple(
        _judged(look, float(adjusted[look.name]), level, recipe) if look.name in adjusted else look for look in looks
    )


def _judged(look: DriftTest, adjusted: float, level: float, recipe: Recipe) -> DriftTest:
    """Return a test with its verdict.

    Args:
        look: The test.
        adjusted: Its corrected p-value.
        level: Level of all tests.
        recipe: Recipe of the model, for the advice.
    """
    verdict: Verdict = "none"
    if adjusted <= level:
        verdict = "drift" if (look.effect or 0.0) >= (look.matters_from or 0.0) else "small"
    advice = advice_of(look, recipe) if verdict == "drift" else ""
    return look.model_copy(update={"adjusted": adjusted, "verdict": verdict, "advice": advice})


def _side(sample: Sample) -> RowSource:
    """Return the description of one side's rows."""
    return RowSource(name=sample.name, rows=len(sample), total=sample.total)


def _look_at_text(looks: DriftTests, before: TextFeatures, now: TextFeatures) -> None:
    """Test unknown tokens, words, lengths, truncation and tokens."""
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
    """Return the share of rows that contain each word outside the vocabulary."""
    shares: dict[str, float] = {}
    for words in side.words:
        for word in words:
            shares[word] = shares.get(word, 0.0) + 1 / len(side.words)
    return shares


def _look_at_tokens(looks: DriftTests, before: Any, now: Any) -> None:
    """Test which tokens occur.

    The kernel multiplies square roots of the tokens' shares in each row, which gives Bhattacharyya's coefficient.
    """
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
    """Return the parts that changed most."""
    return tuple(
        ChangedPart(name=str(name), reference=float(shares[0][place]), recent=float(shares[1][place]))
        for name, place in zip(names, places, strict=True)
    )


def _look_at_classes(looks: DriftTests, before: np.ndarray, now: np.ndarray) -> None:
    """Test confidence and the shares of predicted classes."""
    looks.numbers("confidence", before.max(axis=1), now.max(axis=1), "ratio")
    width = before.shape[1]
    if width < 2:
        return
    chosen = before.argmax(axis=1), now.argmax(axis=1)
    names = artifact_labels(looks.model.folder) or tuple(map(str, range(width)))
    shares = [np.bincount(classes, minlength=width) / len(classes) for classes in chosen]
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:_MOST_PARTS]
    tested = class_shares(*chosen, width, looks.seed)
    looks.add("classes", CHI, tested, parts=_parts([names[index] for index in order], order, shares))


def _look_at_ranges(looks: DriftTests, before: RowActivations, now: RowActivations) -> None:
    """Test activation ranges: the share that static INT8 clips, or for other graphs whether activations have grown."""
    stored = before.ranges[0].stored
    values = [
        activations.cut if stored else np.log(np.maximum(activations.peaks, _LEAST)) for activations in (before, now)
    ]
    tested = grown_means(values[0], values[1], looks.seed)
    # Of equal p-values the larger effect first.
    order = np.lexsort([-tested.effects, tested.p_values])
    shown = [activations.mean(axis=0) if stored else np.exp(activations.mean(axis=0)) for activations in values]
    parts = tuple(
        ChangedPart(
            name=before.ranges[layer_index].layer,
            reference=float(shown[0][layer_index]),
            recent=float(shown[1][layer_index]),
            note=_range_note(before, now, layer_index),
            p_value=float(tested.p_values[layer_index]),
        )
        for layer_index in order[:_MOST_PARTS]
    )
    worst = int(order[0])
    largest = Tested(float(tested.effects[worst]), float(tested.p_values[worst]))
    rows = [activations[:, worst] if stored else np.exp(activations[:, worst]) for activations in values]
    looks.spread("ranges", MOST, largest, rows[0], rows[1], unit="ratio" if stored else "", parts=parts)


def _range_note(before: RowActivations, now: RowActivations, layer_index: int) -> str:
    """Return the clipping range of a layer, and the range of its activations on both sides."""
    range_ = before.ranges[layer_index]
    outer = [
        f"{activations.least[:, layer_index].min():.3g} to {activations.greatest[:, layer_index].max():.3g}"
        for activations in (before, now)
    ]
    seen = f"seen {outer[0]} before, {outer[1]} now"
    return f"8 bits stand for {range_.low:.3g} to {range_.high:.3g}; {seen}" if range_.stored else seen
