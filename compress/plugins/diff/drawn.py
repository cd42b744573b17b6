"""What two models answer to inputs that are drawn, where nobody has rows for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.decoder import feeder
from compress.formats.runtime import Session
from compress.models.json_file import read_json
from compress.numerics.output_agreement import output_agreement
from compress.numerics.token_metrics import divergence, log_probabilities
from compress.plugins.diff.answers import HERE, mean_of
from compress.plugins.diff.record import AnswersDiff
from compress.results.metrics import metric_on_slice
from compress.results.report import FINAL, Measurement
from compress.tasks.classes import agreement_row
from compress.utils.errors import InputError
from compress.utils.progress import Progress

_LENGTHS, _EACH = (8, 16, 32, 64), 16
_SEED = 0
_FLIPS = 20
_LOGITS = "logits"


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
        hint="name a file of rows with --data, and a recipe that says how they are read with --recipe",
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
            rows += [row.model_copy(update={"metric": metric_on_slice(row.metric, f"tokens={length}")}) for row in own]
    return AnswersDiff(inputs=drawn.what, rows=tuple(rows), flips=tuple(flips[:_FLIPS]))


def _drawn_rows(same: np.ndarray, apart: np.ndarray, surer: np.ndarray | None) -> list[Measurement]:
    whole = set(np.unique(same)) <= {0.0, 1.0}
    rows = [agreement_row(same, FINAL, HERE) if whole else mean_of("agreement", same, "ratio")]
    rows.append(mean_of("kl_divergence", apart, "nats"))
    return rows if surer is None else [*rows, mean_of("confidence_change", surer, "ratio")]


def _plain(metric: str, value: float) -> Measurement:
    return Measurement(model=FINAL, metric=metric, target=HERE, value=float(value), unit="ratio")
