"""What a run has to tell of models that draw: what a judge sees, pictures side by side, and where paths part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.membership import Part
from compress.evaluation.evaluate import slice_rows
from compress.evaluation.image_files import difference_of, png_of
from compress.evaluation.image_judge import Asked
from compress.evaluation.sampling_paths import sampling_path
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target
from compress.models.diffusion_sampling import Sampling
from compress.numerics.sampling_drift import SamplingPath, drift
from compress.pipeline.target_session import TargetSession
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, DriftRecord, PictureRecord
from compress.runtimes.picture_sampler import IDS, NOISE, PICTURES, SEED
from compress.runtimes.picture_session import PictureSession
from compress.tasks.capability import DRAWS
from compress.utils.digests import digest_directory
from compress.utils.progress import Progress

_JUDGE_VERSION = 1
"""Raised when a judge would see other things in the same pictures."""


def judgements(session: TargetSession, parts: Sequence[Part]) -> list[Measurement]:
    """What the recipe's judge sees in the pictures that each model drew, on all rows and each slice of them."""
    folder = session.runner.inputs.judge
    if folder is None:
        return []
    rows, labels = session.runner.inputs.data.split(session.split), list(session.found)
    classes = rows["label"].to_pylist() if "label" in rows.column_names else None
    usual = session.found[BASELINE].kept[PICTURES] if BASELINE in session.found else None
    asked = Asked(folder, rows["text"].to_pylist(), classes, session.found[labels[0]].labels, usual)
    key = {
        "judge": digest_directory(folder),
        "data": session.runner.inputs.data.digest(session.split),
        "baseline": session.digests.get(BASELINE),
        "version": _JUDGE_VERSION,
    }
    found = []
    for label in labels:

        def find(_: Target, threads: int, progress: Progress, text: str, label: str = label) -> list[dict[str, Any]]:
            progress.note(text)
            return [row.model_dump() for row in asked.rows(session.found[label].kept[PICTURES])]

        names = (f"judgement of {label}", f"look at what {label} drew")
        kept = session.kept_json("judgement", label, key, "rows.json", names, find)
        found += [Measurement.model_validate({**row, "model": label, "target": session.target.name}) for row in kept]
    return found + slice_rows(found, parts)


def steps(session: TargetSession) -> list[Measurement]:
    """In how many steps each model draws a picture."""
    if DRAWS not in session.runner.inputs.task.capabilities:
        return []
    return [
        Measurement(
            model=label,
            metric="sampling_steps",
            target=session.target.name,
            value=Sampling.read(folder).steps,
            unit="count",
        )
        for label, folder in session.artifacts.items()
    ]


def grid(session: TargetSession) -> list[PictureRecord]:
    """The first pictures that each model drew, with how they differ from the baseline's."""
    count = session.runner.recipe.evaluation.pictures
    if DRAWS not in session.runner.inputs.task.capabilities or not count or BASELINE not in session.found:
        return []
    prompts = session.runner.inputs.data.split(session.split)["text"].slice(0, count).to_pylist()
    usual = session.found[BASELINE].kept[PICTURES]
    found = []
    for label, given in session.found.items():
        for row, prompt in enumerate(prompts):
            levels, more = given.kept[PICTURES][row], dict[str, Any]()
            if label != BASELINE:
                apart = np.abs(levels.astype(np.float64) - usual[row]).mean()
                more = {"difference": difference_of(levels, usual[row]), "levels": round(float(apart), 2)}
            found.append(
                PictureRecord(
                    model=label, target=session.target.name, prompt=prompt, seed=row, png=png_of(levels), **more
                )
            )
    return found


def drifts(session: TargetSession) -> list[DriftRecord]:
    """How each model's latents leave the baseline's, over the pictures of the `grid`."""
    count = session.runner.recipe.evaluation.pictures
    if DRAWS not in session.runner.inputs.task.capabilities or not count or BASELINE not in session.artifacts:
        return []

    def path_of(label: str, threads: int) -> SamplingPath:
        opened = _open(session.artifacts[label], session.target, threads)
        batch = session.examples(label).batch(range(min(count, len(session.examples(label)))))
        return sampling_path(opened.sampler, batch[IDS], batch[NOISE], batch[SEED].tolist())

    usual = cache(path_of)
    key = {
        "data": session.runner.inputs.data.digest(session.split),
        "count": count,
        "baseline": session.digests[BASELINE],
    }
    records = []
    shape = session.examples(BASELINE).inputs[0][NOISE].shape
    for label in (one for one in session.artifacts if one != BASELINE):
        if session.examples(label).inputs[0][NOISE].shape != shape:
            continue  # pictures of another size begin as other noise

        def find(_: Target, threads: int, progress: Progress, text: str, label: str = label) -> dict[str, Any]:
            progress.note(text)
            own = path_of(label, threads)
            found = drift(usual(BASELINE, threads), own)
            place = found.parting()
            low, typical, high = np.quantile(found.distances, [0.25, 0.5, 0.75], axis=1).round(6).tolist()
            return {
                "steps": len(own.times) - 1,
                "times": found.times.tolist(),
                "typical": typical,
                "low": low,
                "high": high,
                "parted": None if place is None else float(found.times[place]),
            }

        names = (f"drift of {label}", f"follow {label} step by step")
        kept = session.kept_json("drift", label, key, "drift.json", names, find)
        records.append(DriftRecord.model_validate({**kept, "model": label, "target": session.target.name}))
    return records


def _open(artifact: Path, target: Target, threads: int) -> PictureSession:
    found = get_runtime(target.runtime).open(artifact, target, threads)
    assert isinstance(found, PictureSession), "whatever draws is opened as such a session"
    return found
