"""Pictures in the measured process: each call of a part timed, and the whole of a picture."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from compress.models.diffusion_checks import is_pipeline
from compress.models.diffusion_sampling import load_prompt_processor, load_scheduler
from compress.runtimes.picture_sampler import IDS, NOISE, SEED, Call, PictureSampler
from compress.runtimes.runtime import Batch, Session, TimesItself
from compress.utils.errors import InputError, StageError

_MODEL, _TRANSFER = "model_", "transfer_bytes"


@runtime_checkable
class ImageGenerationSession(Protocol):
    """A session of several parts, each a session of its own, that draws pictures with them."""

    @property
    def sampler(self) -> PictureSampler:
        """The loop over the parts."""

    @property
    def parts(self) -> Mapping[str, Session]:
        """They by optimum's names of their folders, in the order in which they run."""


def load_sampling_loop(artifact: Path) -> None:
    """Load once what draws with the parts of a pipeline, so that what comes after is the parts' own memory and time.

    Scheduler and tokenizer are diffusers' and transformers', which bring torch. Nothing is done for other models.
    """
    if artifact.is_dir() and is_pipeline(artifact):
        load_scheduler(artifact)
        load_prompt_processor(artifact)


@dataclass
class _Timed:
    """A part that is timed at each call, and keeps what it is given where it is asked to."""

    part: Call
    keeps: bool = False
    given: list[Batch] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        if self.keeps:
            self.given.append(batch)
        switches, start = preemptions(), time.perf_counter_ns()
        found = self.part(batch)
        self.times_ms.append((time.perf_counter_ns() - start) / 1e6)
        self.disturbed.append(preemptions() != switches)
        return found


def external_sessions(session: object) -> list[TimesItself]:
    """The sessions of a model whose graphs run in other processes; none of one that runs in this."""
    sessions = session.parts.values() if isinstance(session, ImageGenerationSession) else [session]
    return [one for one in sessions if isinstance(one, TimesItself)]


def combined_start_up(sessions: Sequence[TimesItself]) -> dict[str, float]:
    """What the starts of parts took, as one process with all of them would have it: its runtime once, each model."""
    first, *others = (one.start_up for one in sessions)
    found = dict(first)
    for other in others:
        for name in found:
            found[name] += other[name] if name.startswith(_MODEL) else 0.0
        if _TRANSFER in found:
            found[_TRANSFER] += other[_MODEL + _TRANSFER]
    return found


def preemptions() -> int:
    """How often any thread of this process had to stop for another process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def time_image(session: object, batch: Batch, steps: int | None, size: int | None, untimed: int) -> dict[str, Any]:
    """Milliseconds of a picture and of the calls it took; see `ImageTimes`.

    ``token_timing`` and ``size``, in pixels a side, of None are the model's own. As many steps as ``untimed`` are made before,
    since another process has just used the caches. Raises `StageError` for a session that draws no pictures, and
    `InputError` for a size or steps that it can't draw in.
    """
    if not isinstance(session, ImageGenerationSession):
        raise StageError("The model draws no pictures.", where="benchmark", expected="a model of a task that draws")
    sampler = session.sampler
    if steps is not None:
        sampler = replace(sampler, sampling=replace(sampler.sampling, steps=steps))
    if size is not None:
        batch = {**batch, NOISE: _noise(sampler, size)}
    parts = external_sessions(session)
    if parts:
        return _timed_elsewhere(sampler, parts, batch)
    if untimed:
        fewer = replace(sampler.sampling, steps=min(untimed, sampler.sampling.steps))
        _drawn(replace(sampler, sampling=fewer), batch)
    return _drawn(sampler, batch)[0]


def _noise(sampler: PictureSampler, size: int) -> np.ndarray:
    """Of one square picture, [1, channels, side, side]; latents take as long whatever they are."""
    side, rest = divmod(size, sampler.latents.factor)
    if rest:
        raise InputError(
            f"No picture of {size} pixels a side can be drawn.",
            where="benchmark.picture_sizes",
            expected=f"multiples of {sampler.latents.factor * sampler.latents.multiple}",
        )
    shape = (1, sampler.latents.channels, side, side)
    return np.random.default_rng(size).standard_normal(shape, dtype=np.float32)


def _drawn(sampler: PictureSampler, batch: Batch, keeps: bool = False) -> tuple[dict[str, Any], list[_Timed]]:
    text, denoiser, decoder = (_Timed(part, keeps) for part in (sampler.encode, sampler.denoise, sampler.decode))
    timed = replace(sampler, encode=text, denoise=denoiser, decode=decoder)
    start = time.perf_counter_ns()
    timed.draw(batch[IDS], batch[NOISE], batch[SEED].tolist())
    image_ms = (time.perf_counter_ns() - start) / 1e6
    return {
        "image_ms": image_ms,
        "text_ms": sum(text.times_ms),
        "steps_ms": denoiser.times_ms,
        "decoder_ms": sum(decoder.times_ms),
        "disturbed": [any(text.disturbed), *denoiser.disturbed, any(decoder.disturbed)],
    }, [text, denoiser, decoder]


def _timed_elsewhere(sampler: PictureSampler, parts: list[TimesItself], batch: Batch) -> dict[str, Any]:
    """Of parts in processes of their own: the calls of one picture made again there, by the clock over there.

    What the scheduler takes here is added to their sum for the whole, so that the way there and back isn't in it.
    """
    found, watched = _drawn(sampler, batch, keeps=True)
    loop_ms = found["image_ms"] - sum(sum(one.times_ms) for one in watched)
    times = []
    for session, one in zip(parts, watched, strict=True):
        session.hold(one.given)
        times.append(session.time(range(len(one.given))))
    text_ms, steps_ms, decoder_ms = times
    return {
        "image_ms": sum(map(sum, times)) + loop_ms,
        "text_ms": sum(text_ms),
        "steps_ms": list(steps_ms),
        "decoder_ms": sum(decoder_ms),
        "disturbed": [False] * (len(steps_ms) + 2),
    }
