"""What two models answer to the same inputs: rows of a file, or inputs that are drawn, each through its own runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.checkpoints.json_file import read_json
from compress.compare.change import Comparison
from compress.compare.flips import input_texts, shortened
from compress.compare.reports import compare_reports
from compress.data.dataset import TEST, load_dataset
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Slice
from compress.diff.record import AnswersDiff
from compress.errors import CompressError, InputError, ModelError
from compress.evaluation.evaluate import Predictions, artifact_labels, encode_for, predict, slices_of_task
from compress.formats.model_file import format_of
from compress.formats.runtimes import get_runtime, why_unavailable
from compress.formats.targets import PROFILES
from compress.measurement import Measurement
from compress.metrics import slice_metric
from compress.numerics.calibration import mean_interval
from compress.numerics.next_token import divergence, log_probabilities
from compress.numerics.output_agreement import output_agreement
from compress.progress import Progress
from compress.recipe.policy import COMPARE, Policy
from compress.recipe.recipe import Recipe
from compress.report.predictions import Answers, write_predictions
from compress.report.schema import BASELINE, FINAL, DataRecord, Report, SliceRecord
from compress.runtimes.decoder import feeder
from compress.runtimes.runtime import Session
from compress.targets import Target
from compress.tasks.capability import READS_ROWS
from compress.tasks.classes import agreement_row, mean_row
from compress.tasks.task import Task

WHERE = "here"
"""In place of a target: each of both runs where its own format does."""
_LENGTHS, _EACH = (8, 16, 32, 64), 16
_SEED = 0
_FLIPS = 20
_QUARTILES = (Slice(length="quartiles"),)
_LOGITS = "logits"
Batches = Sequence[Mapping[str, np.ndarray]]


def target_of(artifact: Path) -> Target:
    """The first that opens the format of ``artifact`` here. Raises `InputError` where none does."""
    form, reasons = format_of(artifact), []
    for profile in PROFILES.values():
        if profile.target.format == form:
            reason = why_unavailable(profile.target)
            if reason is None:
                return profile.target
            reasons.append(f"{profile.name}: {reason}")
    raise InputError(
        f"Nothing here runs files of the format {form}.", where=str(artifact), expected="; ".join(reasons[:3]) or None
    )


def on_rows(before: Path, after: Path, recipe: Recipe, folder: Path, task: Task, progress: Progress) -> AnswersDiff:
    """Both on the test split of ``recipe``, whose relative paths count from ``folder``.

    Raises what reading the data and running the models raise.
    """
    data = load_dataset(recipe.data, task.columns, folder, progress)
    rows, length = data.split(TEST), recipe.data.max_length
    artifacts = {BASELINE: before, FINAL: after}
    found: dict[str, Predictions] = {}
    examples = {}
    for label, artifact in artifacts.items():
        beside = None if label == BASELINE else before
        examples[label] = encode_for(artifact, task, rows, length, recipe.evaluation, beside)
        target, text = target_of(artifact), f"ask {artifact.name or artifact}"
        found[label] = predict(artifact, task, examples[label], target, 1, progress, text)

    def lengths(unit: str) -> np.ndarray:
        return character_lengths(data, TEST) if unit == "characters" else examples[BASELINE].lengths()[: len(rows)]

    parts: list[Part] = []
    with suppress(CompressError):  # rows without a length, such as images
        parts = find_parts(recipe.slices or task.slices or _QUARTILES, data, TEST, lengths)[0]
    if READS_ROWS not in task.capabilities:
        parts = [replace(part, rows=task.members(rows, part.rows, examples[BASELINE])) for part in parts]
    parts = [part for part in parts if part.rows.any()]
    measured: list[Measurement] = []
    for label, own in found.items():
        whole = task.measure(own.kept, own.labels, label, WHERE)
        measured += [*whole, *slices_of_task(task, own, whole, parts)]
    near = [*task.compare(found[FINAL].kept, found[BASELINE].kept, FINAL, WHERE), *_apart(task, found)]
    record = DataRecord(split=TEST, digest=data.digest(TEST), rows=len(rows), labels=data.labels)
    report = Report(
        recipe=recipe.name,
        data=record,
        measurements=(*measured, *near),
        slices={part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts},
    )
    answers = {label: _answers(task, artifacts[label], found[label], data.labels) for label in found}
    ids = found[BASELINE].labels
    names = [data.labels[place] for place in ids] if data.labels and ids is not None else []
    comparison = _compared(report, answers, names, input_texts(data, TEST))
    return AnswersDiff(inputs=f"{len(rows):,} rows", rows=tuple(near), comparison=comparison)


def _apart(task: Task, found: Mapping[str, Predictions]) -> list[Measurement]:
    """The divergence of classes' probabilities, which tasks with classes don't tell."""
    old, new = (task.probabilities(found[label].kept) for label in (BASELINE, FINAL))
    if old is None or new is None or old.shape != new.shape:
        return []
    with np.errstate(divide="ignore"):
        values = divergence(np.log(old), np.log(new))
    sure = mean_row("confidence_change", new.max(axis=-1) - old.max(axis=-1), FINAL, WHERE)
    return [_mean("kl_divergence", values, "nats"), sure.model_copy(update={"raw": None})]


def _answers(task: Task, artifact: Path, found: Predictions, labels: Sequence[str]) -> Answers | None:
    chances = task.probabilities(found.kept)
    if chances is None:
        return None
    names, chosen = artifact_labels(artifact) or labels, chances.argmax(axis=-1)
    return Answers([names[place] for place in chosen], chances.max(axis=-1), chosen == found.labels)


def _compared(
    report: Report, answers: Mapping[str, Answers | None], labels: Sequence[str], texts: Sequence[str]
) -> Comparison | None:
    """The two of one report, with examples of what flipped; None where nothing was measured of both."""
    with tempfile.TemporaryDirectory(prefix="compress-diff-") as scratch:
        folder = Path(scratch)
        known = {(label, WHERE): one for label, one in answers.items() if one is not None}
        if known and labels:
            write_predictions(labels, known, folder, several=False)
        try:
            policy = COMPARE.model_copy(update={"model": FINAL})
            found = beside(report, report, policy, (folder, folder), BASELINE)
        except InputError:
            return None
    flips = tuple(one.model_copy(update={"example": shortened(texts[one.row])}) for one in found.flips)
    return found.model_copy(update={"flips": flips})


def beside(
    before: Report,
    after: Report,
    policy: Policy,
    folders: tuple[Path | None, Path | None],
    baseline_model: str | None = None,
) -> Comparison:
    """Two reports compared without what only a clock or a scale says."""
    reports = [
        one.model_copy(update={"measurements": tuple(row for row in one.measurements if not _weighed(row))})
        for one in ((before,) if before is after else (before, after))
    ]
    return compare_reports(
        reports[0], reports[-1], policy, names=("A", "B"), baseline_model=baseline_model, folders=folders
    )


def _weighed(row: Measurement) -> bool:
    from compress.metrics import describe_metric

    known = describe_metric(row.metric, row.unit)
    return known.timed or known.style in ("bytes", "count") or row.model == "machine"


@dataclass(frozen=True)
class Drawn:
    """Inputs that were drawn, batch by batch, and how many tokens each batch's have; 0 of what isn't text."""

    batches: tuple[dict[str, np.ndarray], ...]
    lengths: tuple[int, ...]
    what: str


def draw(before: Path, after: Path) -> Drawn:
    """Inputs that both models take, by their configs. Raises `InputError` where nothing says what they take."""
    sides = [read_json(folder / "config.json") for folder in (before, after)]
    generator = np.random.default_rng(_SEED)
    texts = [_text_of(config) for config in sides]
    vocabulary = [config.get("vocab_size") for config in texts]
    if all(isinstance(size, int) for size in vocabulary):
        most = min(int(config.get("max_position_embeddings") or config.get("n_positions") or 512) for config in texts)
        longest = [length for length in _LENGTHS if length <= most - 2] or [max(1, most - 2)]
        size = min(int(size or 0) for size in vocabulary)
        batches = [_tokens(generator.integers(0, size, (_EACH, length))) for length in longest]
        return Drawn(
            tuple(batches),
            tuple(longest),
            f"{_EACH * len(longest)} drawn texts of {longest[0]} to {longest[-1]} tokens",
        )
    shapes = [_pixels(config) for config in sides]
    if shapes[0] is not None and shapes[0] == shapes[1]:
        pixels = generator.standard_normal((4 * _EACH, *shapes[0])).astype(np.float32)
        parts = [{"pixel_values": pixels[start : start + _EACH]} for start in range(0, len(pixels), _EACH)]
        return Drawn(tuple(parts), (0,) * len(parts), f"{len(pixels)} drawn images")
    raise InputError(
        "Nothing says what both models take.",
        where=f"{before} and {after}",
        expected="configs with a vocabulary, or with the same image_size and num_channels",
        mend="name a file of rows with --data, and a recipe that says how they are read with --recipe",
    )


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _tokens(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _pixels(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    size, channels = config.get("image_size"), config.get("num_channels", 3)
    if isinstance(size, int):
        return int(channels), size, size
    return (int(channels), *map(int, size)) if isinstance(size, list) and len(size) == 2 else None  # type: ignore[return-value]


def opened(artifact: Path) -> Session:
    """``artifact`` where its format runs. Raises what opening raises."""
    target = target_of(artifact)
    return get_runtime(target.runtime).open(artifact, target, 1)


def on_drawn(before: Path, after: Path, drawn: Drawn, sessions: Sequence[Session], progress: Progress) -> AnswersDiff:
    """Both on drawn inputs. Raises what running raises."""
    feeds = [feeder(session, str(folder)) for session, folder in zip(sessions, (before, after), strict=True)]
    outputs: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in progress.track(drawn.batches, "ask both", len(drawn.batches)):
        given = [session.predict(feed(batch)) for session, feed in zip(sessions, feeds, strict=True)]
        name = next((one for one in (_LOGITS, *given[0]) if all(one in answers for answers in given)), None)
        if name is None or given[0][name].shape != given[1][name].shape:
            return AnswersDiff(inputs=drawn.what, notes=(_unlike(given, name),))
        outputs.append((given[0][name].astype(np.float64), given[1][name].astype(np.float64)))
    if name != _LOGITS:
        wide = [np.concatenate([pair[side].reshape(len(pair[side]), -1)[:, :_widest(outputs)] for pair in outputs])
                for side in (0, 1)]  # fmt: skip
        near = output_agreement(*wide)
        rows = [_plain("rms_error", near.rms), _plain("output_cosine", near.cosine)]
        return AnswersDiff(inputs=drawn.what, rows=tuple(rows))
    return _of_logits(drawn, outputs)


def _widest(outputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    return min(int(np.prod(pair[0].shape[1:])) for pair in outputs)


def _unlike(given: Sequence[Mapping[str, np.ndarray]], name: str | None) -> str:
    if name is None:
        return f"their answers have no name in common: {', '.join(given[0])} and {', '.join(given[1])}"
    shapes = [list(one[name].shape) for one in given]
    return f"their answers have other shapes: {name} {shapes[0]} and {shapes[1]}"


def _of_logits(drawn: Drawn, outputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> AnswersDiff:
    """Agreement, divergence and confidence, on all and by length, with the answers that flipped."""
    same, apart, surer, flips = [], [], [], []
    for before, after in outputs:
        answers = before.argmax(axis=-1), after.argmax(axis=-1)
        each = (answers[0] == answers[1]).reshape(len(before), -1)
        same.append(each.mean(axis=1))
        apart.append(divergence(before, after).reshape(len(before), -1).mean(axis=1))
        chances = [np.exp(log_probabilities(side).max(axis=-1)).reshape(len(before), -1) for side in (before, after)]
        surer.append((chances[1] - chances[0]).mean(axis=1))
        if before.ndim == 2:
            flips += [
                f"input {place + _EACH * (len(same) - 1)}: {old} ({chances[0][place, 0]:.2f}) \u2192 "
                f"{new} ({chances[1][place, 0]:.2f})"
                for place, (old, new) in enumerate(zip(*answers, strict=True))
                if old != new
            ]
    rows = _drawn_rows(np.concatenate(same), np.concatenate(apart), np.concatenate(surer))
    for length, one, other in zip(drawn.lengths, same, apart, strict=True):
        if len(drawn.lengths) > 1 and length:
            own = _drawn_rows(one, other, None)
            rows += [row.model_copy(update={"metric": slice_metric(row.metric, f"tokens={length}")}) for row in own]
    return AnswersDiff(inputs=drawn.what, rows=tuple(rows), flips=tuple(flips[:_FLIPS]))


def _drawn_rows(same: np.ndarray, apart: np.ndarray, surer: np.ndarray | None) -> list[Measurement]:
    whole = set(np.unique(same)) <= {0.0, 1.0}
    rows = [agreement_row(same, FINAL, WHERE) if whole else _mean("agreement", same, "ratio")]
    rows.append(_mean("kl_divergence", apart, "nats"))
    return rows if surer is None else [*rows, _mean("confidence_change", surer, "ratio")]


def _mean(metric: str, samples: np.ndarray, unit: str) -> Measurement:
    value, low, high = mean_interval(samples, _SEED)
    return Measurement(
        model=FINAL, metric=metric, target=WHERE, value=value, unit=unit, low=low, high=high, n=len(samples)
    )


def _plain(metric: str, value: float) -> Measurement:
    return Measurement(model=FINAL, metric=metric, target=WHERE, value=float(value), unit="ratio")


def check_config_there(folder: Path) -> None:
    """Raise `ModelError` where nothing says how a model is asked."""
    if not (folder / "config.json").is_file():
        raise ModelError("There is no config.json beside the weights.", where=str(folder))
