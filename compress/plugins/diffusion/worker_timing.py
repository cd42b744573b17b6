"""Image generation in the worker process: each call of a component is timed, and the whole image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.worker import external_sessions, preemptions
from compress.formats.runtime import Batch, TimesItself
from compress.plugins.diffusion.pipeline_model import load_prompt_processor, load_scheduler
from compress.plugins.diffusion.sampler import IDS, NOISE, SEED, ComponentCall, DiffusionSampler, DiffusionSession
from compress.utils.errors import InputError, StageError


def load_libraries(artifact: Path) -> None:
    """Load the libraries that run a pipeline's components, so that later measurements show only the components.

    Scheduler and tokenizer are those of diffusers and transformers, which import torch. Nothing happens for other
    models.
    """
    load_scheduler(artifact)
    load_prompt_processor(artifact)


@dataclass
class _Timed:
    """Component whose calls are timed. If ``keeps`` is set, it also records their inputs."""

    part: ComponentCall
    keeps: bool = False
    given: list[Batch] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        if self.keeps:
            self.given.append(batch)
        switches, start = preemptions(), time.perf_counter_ns()
        outputs = self.part(batch)
        self.times_ms.append((time.perf_counter_ns() - start) / 1e6)
        self.disturbed.append(preemptions() != switches)
        return outputs


def time_image(session: object, batch: Batch, steps: int | None, size: int | None, untimed: int) -> dict[str, Any]:
    """Time one image and the calls that it takes; see `ImageTimes`.

    As many steps as ``untimed`` run before, because another process has just used the caches.

    Args:
        session: Open model.
        batch: Prompt, noise and seed of one image.
        steps: Number of denoising steps. None uses the model's own number.
        size: Side of the image in pixels. None uses the model's own size.
        untimed: Number of steps before the timed ones.

    Raises:
        StageError: The session generates no images.
        InputError: The model cannot generate images of this size or with these steps.
    """
    if not isinstance(session, DiffusionSession):
        raise StageError("The model draws no pictures.", where="benchmark", expected="a model of a task that draws")
    sampler = session.sampler
    if steps is not None:
        sampler = replace(sampler, sampling=replace(sampler.sampling, steps=steps))
    if size is not None:
        # Noise for one square image, [1, channels, side, side]. Its values don't affect the time.
        side, remainder = divmod(size, sampler.latents.factor)
        if remainder:
            raise InputError(
                f"No picture of {size} pixels a side can be drawn.",
                where="benchmark.picture_sizes",
                expected=f"multiples of {sampler.latents.factor * sampler.latents.multiple}",
            )
        shape = (1, sampler.latents.channels, side, side)
        batch = {**batch, NOISE: np.random.default_rng(size).standard_normal(shape, dtype=np.float32)}
    parts = external_sessions(session)
    if parts:
        return _timed_elsewhere(sampler, parts, batch)
    if untimed:
        shorter = replace(sampler.sampling, steps=min(untimed, sampler.sampling.steps))
        _drawn(replace(sampler, sampling=shorter), batch)
    return _drawn(sampler, batch)[0]


def _drawn(sampler: DiffusionSampler, batch: Batch, keeps: bool = False) -> tuple[dict[str, Any], list[_Timed]]:
    text, denoiser, decoder = (_Timed(part, keeps) for part in (sampler.encode, sampler.denoise, sampler.decode))
    timed = replace(sampler, encode=text, denoise=denoiser, decode=decoder)
    start = time.perf_counter_ns()
    timed.generate(batch[IDS], batch[NOISE], batch[SEED].tolist())
    image_ms = (time.perf_counter_ns() - start) / 1e6
    return {
        "image_ms": image_ms,
        "text_ms": sum(text.times_ms),
        "steps_ms": denoiser.times_ms,
        "decoder_ms": sum(decoder.times_ms),
        "disturbed": [any(text.disturbed), *denoiser.disturbed, any(decoder.disturbed)],
    }, [text, denoiser, decoder]


def _timed_elsewhere(sampler: DiffusionSampler, parts: list[TimesItself], batch: Batch) -> dict[str, Any]:
    """Time components in other processes: each repeats the calls of one image, timed by its own clock.

    The scheduler's time in this process is added to their sum, so that the transfer between processes doesn't count.
    """
    reply, recorded = _drawn(sampler, batch, keeps=True)
    loop_ms = reply["image_ms"] - sum(sum(component.times_ms) for component in recorded)
    times = []
    # The other process receives the recorded inputs, and times the same calls by its own clock.
    for session, component in zip(parts, recorded, strict=True):
        session.hold(component.given)
        times.append(session.time(range(len(component.given))))
    text_ms, steps_ms, decoder_ms = times
    return {
        "image_ms": sum(map(sum, times)) + loop_ms,
        "text_ms": sum(text_ms),
        "steps_ms": list(steps_ms),
        "decoder_ms": sum(decoder_ms),
        "disturbed": [False] * (len(steps_ms) + 2),
    }
