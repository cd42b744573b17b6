"""Drift of a model's inputs: several two-sample tests whose p-values are corrected together.

Rabanser, Günnemann and Lipton 2019, section 4, compare such tests and recommend the model's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.inspection.activation_clipping import RowActivations
from compress.models.processor import load_tokenizer
from compress.plugins.monitoring.features import TextFeatures
from compress.plugins.monitoring.hypothesis_tests import (
    Tested,
    class_shares,
    gaussian_kernel,
    grown_means,
    holm,
    kolmogorov_smirnov,
    mean_discrepancy,
)
from compress.plugins.monitoring.outputs import ModelOutputs, ServedModel, observe
from compress.plugins.monitoring.record import ChangedPart, DriftReport, DriftTest, RowSource
from compress.plugins.monitoring.rows import RowSample
from compress.recipe.recipe import Recipe
from compress.tasks.capability import READS_ROWS
from compress.utils.errors import InputError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LEVEL = 0.005
"""Probability that one comparison reports a drift where there is none: one in seven months of daily comparisons."""
_MOST_PARTS = 12
_FAMILIAR = frozenset({"unknown", "words", "confidence"})
"""Tests that are meaningless against training rows, whose words the model knows and of which it is sure."""


class StatisticalTest(NamedTuple):
    """Statistical test: its name, the meaning of its effect, and the effect from which a drift matters."""

    test: str
    effect_is: str
    matters_from: float


_SPREAD = "distance of the means in standard deviations"
KS = StatisticalTest("Kolmogorov-Smirnov", "greatest distance of the distribution functions", 0.1)
MEAN = StatisticalTest("permutations of the mean, one-sided", _SPREAD, 0.2)
MOST = StatisticalTest("permutations of the mean, one-sided, the largest of all layers", _SPREAD, 0.2)
CHI = StatisticalTest("permutations of chi-square", "Cohen's w", 0.1)
MMD = StatisticalTest("permutations of the maximum mean discrepancy", "share of the spread", 0.002)

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

    model: ServedModel
    tests: list[DriftTest] = field(default_factory=list)

    def add(self, name: str, kind: StatisticalTest, tested: Tested, **fields: object) -> None:
        """Add a computed test.

        Args:
            name: Name of the tested feature.
            kind: The statistical test.
            tested: Effect and p-value.
            **fields: Further fields of `DriftTest`.
        """
        values = {"name": name, "title": _TITLES[name], "verdict": "none", **kind._asdict(), **tested._asdict()}
        self.tests.append(DriftTest.model_validate(values | fields))

    def spread(
        self,
        name: str,
        kind: StatisticalTest,
        tested: Tested,
        reference: np.ndarray,
        recent: np.ndarray,
        **fields: object,
    ) -> None:
        """Add a test of numbers [n] and [m], with their means and quantiles.

        Args:
            name: Name of the tested feature.
            kind: The statistical test.
            tested: Effect and p-value.
            reference: Numbers of the reference rows.
            recent: Numbers of the recent rows.
            **fields: Further fields of `DriftTest`.
        """
        # The page draws distribution functions from these quantiles, so the report needs no raw values.
        steps = np.linspace(0, 1, 41)
        quantiles = tuple(np.quantile(reference, steps).tolist()), tuple(np.quantile(recent, steps).tolist())
        values = {"reference": float(np.mean(reference)), "recent": float(np.mean(recent)), "quantiles": quantiles}
        self.add(name, kind, tested, **(values | fields))

    def shares(self, name: str, reference: np.ndarray, recent: np.ndarray, **fields: object) -> None:
        """Test whether shares per row have grown.

        Args:
            name: Name of the tested feature.
            reference: Shares of the reference rows.
            recent: Shares of the recent rows.
            **fields: Further fields of `DriftTest`.
        """
        # The test takes several columns. Shares are one column, so its only effect and p-value are the result.
        tested = grown_means(reference, recent, self.seed)
        total = Tested(float(tested.effects[0]), float(tested.p_values[0]))
        self.spread(name, MEAN, total, reference, recent, unit="ratio", **fields)

    def numbers(self, name: str, reference: np.ndarray, recent: np.ndarray, unit: str) -> None:
        """Test whether numbers per row have another distribution.

        Args:
            name: Name of the tested feature.
            reference: Numbers of the reference rows.
            recent: Numbers of the recent rows.
            unit: Unit of the numbers.
        """
        self.spread(name, KS, kolmogorov_smirnov(reference, recent), reference, recent, unit=unit)

    @property
    def seed(self) -> int:
        """Return the seed of permutations."""
        return self.model.recipe.seed


def find_drift(
    model: ServedModel,
    reference: RowSample,
    recent: RowSample,
    progress: Progress,
    level: float,
    name: str,
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
    sides = (observe(model, reference, progress, "reference"), observe(model, recent, progress, "recent"))
    tests = run_drift_tests(model, *sides)
    if not any(test.test for test in tests):
        raise InputError(
            f"There is nothing to test in inputs of {model.task.name}.",
            expected="texts, images, recordings, classes",
        )
    trained = (
        f"{reference.name} are rows that the model was trained on: it knows their words and is surer of them than of "
        "any others, so these tests are left out; name rows that no stage has seen, such as the test split"
    )
    return DriftReport(
        artifact=name,
        task=model.task.name,
        reference=RowSource(name=reference.name, rows=len(reference), total=reference.total),
        recent=RowSource(name=recent.name, rows=len(recent), total=recent.total),
        level=level,
        tests=judged(tests, level, model.recipe, reference.is_training_data),
        notes=(trained,) if reference.is_training_data else (),
    )


def run_drift_tests(model: ServedModel, reference: ModelOutputs, recent: ModelOutputs) -> list[DriftTest]:
    """Run every test that both sides allow, without a verdict."""
    tests = DriftTests(model)
    if reference.text is not None and recent.text is not None:
        _test_text(tests, reference.text, recent.text)
    # Clipping is a share that only matters if it grows. Other features may change in both directions.
    for name in reference.media:
        if name == "clipped":
            tests.shares(name, reference.media[name], recent.media[name])
        else:
            tests.numbers(name, reference.media[name], recent.media[name], _UNITS.get(name, ""))
    if reference.probabilities is not None and recent.probabilities is not None:
        _test_classes(tests, reference.probabilities, recent.probabilities)
    if reference.embeddings is not None and recent.embeddings is not None:
        # The kernel is computed once for both sides, and permutations only reassign its rows.
        rows = np.concatenate([reference.embeddings, recent.embeddings])
        tests.add("embeddings", MMD, mean_discrepancy(gaussian_kernel(rows), len(reference.embeddings), tests.seed))
    if reference.activations is not None and recent.activations is not None:
        _test_ranges(tests, reference.activations, recent.activations)
    return tests.tests + [
        DriftTest(name=name, title=_TITLES[name], verdict="not judged", why=why)
        for name, why in reference.lacking.items()
    ]


def judged(
    tests: Sequence[DriftTest], level: float, recipe: Recipe, is_training_data: bool = False
) -> tuple[DriftTest, ...]:
    """Return the tests with verdicts: a drift has a corrected p-value below ``level`` and an effect that matters.

    Args:
        tests: Tests without verdicts.
        level: Probability of a false drift among all tests.
        recipe: Recipe of the model, for the advice.
        is_training_data: The reference consists of training rows.
    """
    # The model knows training rows better than any recent rows, so some tests would always report a drift.
    left_out = {"verdict": "not judged", "why": "the reference is rows of training"}
    tests = [
        test.model_copy(update=left_out) if is_training_data and test.name in _FAMILIAR else test for test in tests
    ]
    tested = [test for test in tests if test.verdict != "not judged"]
    # Holm's correction bounds the probability of any false drift among all tests by the level.
    adjusted = dict(zip((test.name for test in tested), holm([test.p_value or 0.0 for test in tested]), strict=True))
    for index, test in enumerate(tests):
        if test.name in adjusted:
            p_value, verdict = float(adjusted[test.name]), "none"
            # With many rows, effects that do not matter become significant too.
            if p_value <= level:
                verdict = "drift" if (test.effect or 0.0) >= (test.matters_from or 0.0) else "small"
            advice = advice_of(test, recipe) if verdict == "drift" else ""
            tests[index] = test.model_copy(update={"adjusted": p_value, "verdict": verdict, "advice": advice})
    return tuple(tests)


def _test_text(tests: DriftTests, reference: TextFeatures, recent: TextFeatures) -> None:
    """Test unknown tokens, words, lengths, truncation and tokens."""
    if reference.unknown is not None and recent.unknown is not None:
        tests.shares("unknown", reference.unknown, recent.unknown)
    shares = [_word_shares(side) for side in (reference, recent)]
    # Name the words whose share of rows grew most.
    new = sorted(shares[1], key=lambda word: (shares[0].get(word, 0.0) - shares[1][word], word))[:_MOST_PARTS]
    parts = tuple(ChangedPart(name=word, reference=shares[0].get(word, 0.0), recent=shares[1][word]) for word in new)
    tests.shares("words", reference.broken, recent.broken, parts=parts)
    if READS_ROWS in tests.model.task.capabilities:
        tests.numbers("length", reference.lengths, recent.lengths, "tokens")
        tests.shares("cut", reference.cut, recent.cut)
    _test_tokens(tests, reference.tokens, recent.tokens)


def _word_shares(side: TextFeatures) -> dict[str, float]:
    """Return the share of rows that contain each word outside the vocabulary."""
    shares: dict[str, float] = {}
    for words in side.words:
        for word in words:
            shares[word] = shares.get(word, 0.0) + 1 / len(side.words)
    return shares


def _test_tokens(tests: DriftTests, reference: csr_matrix, recent: csr_matrix) -> None:
    """Test which tokens occur.

    The kernel multiplies square roots of the tokens' shares in each row, which gives Bhattacharyya's coefficient.
    """
    from scipy.sparse import vstack

    counts = vstack([reference, recent]).tocsr()
    # Divide the counts of each row by its number of tokens. An empty row stays zero.
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    rows = counts.multiply(1 / totals[:, None]).tocsr()
    rows.data = np.sqrt(rows.data)
    tested = mean_discrepancy((rows @ rows.T).toarray(), reference.shape[0], tests.seed)
    shares = (np.asarray((side > 0).mean(axis=0)).ravel() for side in (reference, recent))
    tests.add("tokens", MMD, tested, parts=_parts(load_tokenizer(tests.model.folder).convert_ids_to_tokens, *shares))


def _parts(name_of: Callable[[int], str], reference: np.ndarray, recent: np.ndarray) -> tuple[ChangedPart, ...]:
    """Return the parts whose shares changed most."""
    most = np.argsort(-np.abs(recent - reference), kind="stable")[:_MOST_PARTS].tolist()
    return tuple(
        ChangedPart(name=str(name_of(index)), reference=float(reference[index]), recent=float(recent[index]))
        for index in most
    )


def _test_classes(tests: DriftTests, reference: np.ndarray, recent: np.ndarray) -> None:
    """Test confidence and the shares of predicted classes."""
    tests.numbers("confidence", reference.max(axis=1), recent.max(axis=1), "ratio")
    width = reference.shape[1]
    # A regression has no classes.
    if width < 2:
        return
    chosen = reference.argmax(axis=1), recent.argmax(axis=1)
    names = artifact_labels(tests.model.folder) or tuple(map(str, range(width)))
    shares = (np.bincount(classes, minlength=width) / len(classes) for classes in chosen)
    # Permutations also hold for rare classes, for which the chi-square distribution does not.
    tested = class_shares(*chosen, width, tests.seed)
    tests.add("classes", CHI, tested, parts=_parts(names.__getitem__, *shares))


def _test_ranges(tests: DriftTests, reference: RowActivations, recent: RowActivations) -> None:
    """Test activation ranges: the share that static INT8 clips, or for other graphs whether activations have grown."""
    # A graph with stored ranges clips beyond them. Peaks span orders of magnitude, so their logarithms are compared.
    stored = reference.ranges[0].stored
    values = [
        activations.cut if stored else np.log(np.maximum(activations.peaks, 1e-9))
        for activations in (reference, recent)
    ]
    tested = grown_means(values[0], values[1], tests.seed)
    # Sort by p-value. The larger effect comes first among equal p-values, which permutations often give.
    order = np.lexsort([-tested.effects, tested.p_values])
    shown = [activations.mean(axis=0) if stored else np.exp(activations.mean(axis=0)) for activations in values]
    parts = tuple(
        ChangedPart(
            name=reference.ranges[layer_index].layer,
            reference=float(shown[0][layer_index]),
            recent=float(shown[1][layer_index]),
            note=_range_note(reference, recent, layer_index),
            p_value=float(tested.p_values[layer_index]),
        )
        for layer_index in order[:_MOST_PARTS]
    )
    worst = int(order[0])
    # The layers' p-values are corrected for their number, so the layer with the smallest one stands for all.
    largest = Tested(float(tested.effects[worst]), float(tested.p_values[worst]))
    rows = [activations[:, worst] if stored else np.exp(activations[:, worst]) for activations in values]
    tests.spread("ranges", MOST, largest, rows[0], rows[1], unit="ratio" if stored else "", parts=parts)


def _range_note(reference: RowActivations, recent: RowActivations, layer_index: int) -> str:
    """Return the clipping range of a layer, and the range of its activations on both sides."""
    range_ = reference.ranges[layer_index]
    outer = [
        f"{activations.least[:, layer_index].min():.3g} to {activations.greatest[:, layer_index].max():.3g}"
        for activations in (reference, recent)
    ]
    seen = f"seen {outer[0]} before, {outer[1]} now"
    return f"8 bits stand for {range_.low:.3g} to {range_.high:.3g}; {seen}" if range_.stored else seen


_LEARN = (
    "label a sample of today's rows and evaluate it with `compress evaluate`; if it is worse there, put them into "
    "`data.splits.train`{unlabeled} and run {stages} again"
)
_TRAINING = ("finetune", "distill", "distill_language_model", "qat", "sparsify_gradually", "lora_recovery")


def advice_of(test: DriftTest, recipe: Recipe) -> str:
    """Return what to do about a drift, in one or two sentences."""
    match test.name:
        case "unknown" | "words":
            # The advice to extend the vocabulary.
            index, stage = _stage(recipe, "trim_vocabulary")
            if stage is None:
                return f"these words are not in the tokenizer's vocabulary: {_retrain(recipe)}"
            fewer = f" and `min_count` to 1 (now {stage.min_count})" if stage.min_count > 1 else ""
            letters = ", `characters: all`" if stage.characters == "seen" else ""
            return (
                "widen the table: put today's text into `data.unlabeled`, "
                f"set `use_unlabeled: true`{letters}{fewer} of "
                f"`stages.{index}.trim_vocabulary`, and run the recipe again"
            )
        case "length" | "cut":
            _, stage = _stage(recipe, "trim_vocabulary")
            positions = " (`trim_vocabulary` has cut the positions to it)" if stage is not None else ""
            longer = f"raise `data.max_length` (now {recipe.data.max_length}){positions} and run the recipe again"
            if test.name == "cut":
                return longer
            return f"if texts are longer, {longer}; times grow with length: `compress bench` on today's rows"
        case "ranges":
            return _recalibrate(recipe)
        case "embeddings":
            return (
                "check whether searches still return the right documents (`compress evaluate` on pairs of today); if "
                f"not, {_retrain(recipe)}, and embed the index anew"
            )
        case "brightness" | "contrast" | "size":
            return f"check the camera and the image decoder; if the change is intended, {_retrain(recipe)}"
        case "loudness" | "clipped" | "seconds" | "rate":
            device = "the microphone, its gain and its sampling rate"
            return f"check {device}; if the change is intended, {_retrain(recipe)}"
        case _:
            return _retrain(recipe)


def _retrain(recipe: Recipe) -> str:
    """Return the advice to train again on recent rows."""
    kinds = [stage.kind for stage in recipe.stages]
    stages = " and ".join(f"`{kind}`" for kind in dict.fromkeys(kinds) if kind in _TRAINING)
    unlabeled = " (unlabeled ones into `data.unlabeled`, which `distill` reads)" if "distill" in kinds else ""
    return _LEARN.format(unlabeled=unlabeled, stages=stages or "a `finetune` stage")


def _recalibrate(recipe: Recipe) -> str:
    """Return the advice to calibrate activation ranges again."""
    index, stage = _stage(recipe, "onnx_int8")
    if stage is None or getattr(stage, "method", "") != "static":
        return f"activations exceed those of the reference: {_retrain(recipe)}"
    method = stage.calibration_method
    wider = f" or set `calibration_method: minmax` (now {method})" if method != "minmax" else ""
    return (
        f"recalibrate: put rows like today's into `data.splits.train`, of which `stages.{index}.onnx_int8` draws its "
        f"{stage.calibration_examples} `calibration_examples`, and run it again{wider}; "
        "`method: dynamic` needs no ranges"
    )


def _stage(recipe: Recipe, kind: str) -> tuple[int, Any]:
    """Return the index of the first stage of a kind, and the stage, or (0, None)."""
    return next(((index, stage) for index, stage in enumerate(recipe.stages) if stage.kind == kind), (0, None))
