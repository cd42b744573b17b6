"""Tests of image generation timing: the calls of each component, and the reported rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from compress.benchmark.record import TimingRecord
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import ImageTimes, TimedRounds
from compress.benchmark.worker import combined_start_up
from compress.formats.runtime import Batch
from compress.plugins.diffusion.pipeline_model import Sampling
from compress.plugins.diffusion.sampler import (
    DiffusionSampler,
    DiffusionSession,
    LatentSpace,
)
from compress.plugins.diffusion.timing import (
    ImageGenerationPlan,
    ImageSetting,
    add_image_round,
    image_rows,
    speedup_rows,
)
from compress.plugins.diffusion.worker_timing import time_image
from compress.results.metrics import describe_metric
from compress.utils.errors import InputError, StageError

TOKENS = 5
BATCH = {
    "input_ids": np.ones((1, TOKENS), np.int64),
    "noise": np.zeros((1, 4, 8, 8), np.float32),
    "seed": np.array([0]),
}


class Part:
    """A fake session that records the input shape of each call."""

    provider, settings = "none", {}

    def __init__(self, name: str) -> None:
        self.name, self.shapes = name, []

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        given = next(iter(batch.values()))
        self.shapes.append(given.shape)
        if self.name == "text":
            return {"last_hidden_state": np.zeros((len(given), TOKENS, 3), np.float32)}
        if self.name == "denoiser":
            return {"out_sample": np.zeros_like(batch["sample"])}
        return {
            "sample": np.zeros((len(given), 1, *(2 * side for side in batch["latent_sample"].shape[2:])), np.float32)
        }


class FarPart(Part):
    """A fake remote session whose call number i takes 10 + i ms."""

    session_load_ms, runtime_bytes, start_up = 0.0, 0.0, {}

    def hold(self, batches: Sequence[Batch]) -> None:
        self.held = [next(iter(batch.values())).shape for batch in batches]

    def time(self, calls: Sequence[int]) -> list[float]:
        return [10.0 + call for call in calls]

    def queued_latencies(self, calls: Sequence[int], gaps_ms: Sequence[float]) -> list[float]:
        raise AssertionError("nothing arrives")

    def cpu_seconds(self) -> float:
        return 0.0

    def peak_bytes(self) -> int:
        return 0


def drawer(kind: type[Part] = Part, guidance: float = 2.0) -> DiffusionSession:
    """Return a diffusion session of three fake components."""
    parts: dict[str, Any] = {name: kind(name) for name in ("text", "denoiser", "decoder")}
    latents = LatentSpace(channels=4, factor=2, multiple=2, scaling=1.0)
    scheduler, empty = DDIMScheduler(clip_sample=False), np.zeros((1, TOKENS), np.int64)
    calls = (part.predict for part in parts.values())
    return DiffusionSession(DiffusionSampler(*calls, scheduler, latents, Sampling(10, guidance), empty), parts, "here")


def test_image_time_consists_of_text_steps_and_decoder() -> None:
    session = drawer()
    times = ImageTimes(**time_image(session, BATCH, None, None, untimed=0))
    # Guidance also encodes the empty prompt and doubles the rows of each step.
    shapes = [part.shapes for part in session.parts.values()]
    assert shapes == [[(1, TOKENS)] * 2, [(2, 4, 8, 8)] * 10, [(1, 4, 8, 8)]]
    assert len(times.steps_ms) == 10 and len(times.disturbed) == 12
    assert 0 < times.text_ms + sum(times.steps_ms) + times.decoder_ms < times.image_ms
    assert times.loop_ms == pytest.approx(times.image_ms - times.text_ms - sum(times.steps_ms) - times.decoder_ms)


def test_requested_steps_and_sizes_are_used() -> None:
    session = drawer(guidance=1.0)
    times = ImageTimes(**time_image(session, BATCH, 4, 24, untimed=2))
    # Two warm-up steps come first; a latent covers 2x2 pixels.
    assert session.parts["denoiser"].shapes == [(1, 4, 12, 12)] * (2 + 4)
    assert len(times.steps_ms) == 4
    for size, words in ((25, "No picture of 25 pixels"), (26, "makes no image")):
        with pytest.raises(InputError, match=words):
            time_image(session, BATCH, None, size, untimed=0)
    with pytest.raises(StageError, match="draws no pictures"):
        time_image(object(), BATCH, None, None, untimed=0)


def test_remote_parts_are_timed_by_their_own_clock() -> None:
    session = drawer(FarPart)
    times = ImageTimes(**time_image(session, BATCH, 3, None, untimed=2))
    assert session.parts["denoiser"].held == [(2, 4, 8, 8)] * 3
    assert (times.text_ms, times.steps_ms, times.decoder_ms) == (21.0, [10.0, 11.0, 12.0], 10.0)
    # The remote times and the local time of the scheduler.
    assert times.image_ms > 21.0 + 33.0 + 10.0


def test_runtime_download_of_several_pages_is_counted_once() -> None:
    starts = [
        {"runtime_compile_ms": 5.0, "model_download_ms": float(part), "transfer_bytes": 100.0 + 10 * part,
         "model_transfer_bytes": 10.0 * part}
        for part in (1, 2, 3)
    ]  # fmt: skip
    parts: list[Any] = [FarPart("denoiser") for _ in starts]
    for part, start in zip(parts, starts, strict=True):
        part.start_up = start
    once = {"runtime_compile_ms": 5.0, "model_download_ms": 6.0}
    assert combined_start_up(parts) == {**once, "transfer_bytes": 160.0, "model_transfer_bytes": 60.0}


def recorded() -> TimingRecord:
    """Return the record of two launches with one image each, of a 4-step model and a 2-step model."""
    plan = ImageGenerationPlan(1)
    record = TimingRecord({name: TimedRounds() for name in plan.timings})
    marks = [False] * 4

    def drawing(text_ms: float, steps_ms: list[float], decoder_ms: float, more_ms: float) -> ImageTimes:
        whole = text_ms + sum(steps_ms) + decoder_ms + more_ms
        return ImageTimes(whole, text_ms, steps_ms, decoder_ms, marks[: len(steps_ms)] + [False] * 2)

    slow, fast = drawing(4, [10, 20, 30, 40], 6, 10), drawing(2, [5, 5], 2, 1)
    slower, faster = drawing(8, [40, 40, 40, 40], 12, 20), drawing(2, [10, 20], 2, 1)
    add_image_round(record, ImageSetting(), 0, {"fp32": slow, "int8": fast}, 1.0)
    add_image_round(record, ImageSetting(), 1, {"fp32": slower, "int8": faster}, 1.0)
    return record


def test_rows_report_the_total_and_each_part() -> None:
    writer = MeasurementWriter("fp32", "cpu", 0)
    rows = {row.metric: row for row in image_rows(writer, recorded(), "fp32", ImageSetting())}
    assert rows["latency_ms"].raw == (120.0, 200.0)
    assert rows["text_encoder_ms"].raw == (4.0, 8.0)
    # As many steps as the 2-step model makes: the first and the last one.
    assert rows["denoiser_step_ms"].raw == (10.0, 40.0, 40.0, 40.0)
    assert rows["decoder_ms"].raw == (6.0, 12.0)
    assert rows["scheduler_ms"].raw == (10.0, 20.0)
    assert {row.unit for row in rows.values()} == {"ms"}


def test_speedups_are_paired_by_launch() -> None:
    writer = MeasurementWriter("int8", "cpu", 0)
    rows = {row.metric: row for row in speedup_rows(writer, recorded(), "int8", "fp32", ImageSetting())}
    assert rows["speedup"].raw == (120 / 15, 200 / 35)
    assert rows["speedup_text_encoder"].raw == (2.0, 4.0)
    # Step by step: 10 / 5 and 40 / 5, then 40 / 10 and 40 / 20; the median of each launch.
    assert rows["speedup_denoiser_step"].raw == (5.0, 3.0)
    assert rows["speedup_decoder"].raw == (3.0, 6.0)


def test_settings_have_suffixes_and_titles() -> None:
    plan = ImageGenerationPlan(2, steps=(4, 50), sizes=(64,))
    assert [setting.suffix for setting in plan.settings] == ["", "_steps_4", "_steps_50", "_size_64"]
    assert set(plan.deciding_timings) < set(plan.timings)
    assert dict(plan.reported)["picture_size_64"] == " of 64 pixels a side"
    assert describe_metric("latency_ms_steps_4").title == "Latency, 4 steps"
    metric = describe_metric("speedup_denoiser_step_size_64")
    assert metric.relative and metric.title == "Speed-up of the step of the denoiser, 64 pixels a side"
    assert describe_metric("denoiser_step_ms").timed
