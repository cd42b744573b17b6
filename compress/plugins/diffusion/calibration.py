"""Calibration inputs of the components of a diffusion model, recorded while it generates images.

A denoiser's activations at the initial noise differ from those at the finished image, so that ranges from one end clip
at the other. Examples are therefore the inputs of real sampling, with the guidance that images will be generated with,
at timesteps spread evenly over the trajectory (Q-Diffusion, Li et al. 2023, section 4.1). One range holds for all
steps, because ONNX Runtime's integer kernels have stored scales.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx

from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.runtime import Batch
from compress.inspection.activation_clipping import RecordingSession
from compress.models.processor import processor_of
from compress.numerics.sampling import spread_sample
from compress.plugins.diffusion.image_metrics import ssim
from compress.plugins.diffusion.onnx_export import open_diffusion
from compress.plugins.diffusion.sampler import (
    DECODER,
    IDS,
    IMAGES,
    LATENT,
    TEXT_ENCODER,
    TIMESTEP,
    DiffusionSampler,
    DiffusionSession,
)
from compress.stages.onnx_int8.accuracy_aware import Merit
from compress.stages.onnx_int8.quantizer import METADATA, SPLIT, validation_examples
from compress.tasks.tokens import by_length
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from compress.stages.base import Context

TIMESTEPS = 25
"""Number of steps of a trajectory that examples are taken at. Li et al. take 20 of 100, and 25 of 50."""
_MAX_IMAGES = 32
"""Number of images whose latents suffice to calibrate a decoder."""
_IMAGE_BATCH = 32


@dataclass(frozen=True)
class ComponentCalibration:
    """Recorded inputs of a component, one feed for each call.

    ``rows`` are the rows of the prompts in the train split. ``timesteps`` are those of a denoiser's feeds, and empty
    for other components.
    """

    feeds: Sequence[Batch]
    rows: Sequence[int] | np.ndarray
    seed: int
    guidance: float
    timesteps: tuple[float, ...] = ()

    def __str__(self) -> str:
        steps = f" at {len(self.timesteps)} timesteps with guidance {self.guidance:g}" if self.timesteps else ""
        return f"{len(self.rows)} prompts{steps}, seed {self.seed}"

    def calls(self) -> dict[str, Batch]:
        """Return the feeds by description: a denoiser's by timestep, the others' by number."""
        names = [f"timestep {timestep:g}" for timestep in self.timesteps]
        return dict(zip(names or [f"call {index + 1}" for index in range(len(self.feeds))], self.feeds, strict=True))

    def record(self, graph: onnx.ModelProto) -> None:
        """Write the calibration data's description into the metadata of ``graph``, in place."""
        digest = hashlib.sha256(np.asarray(self.rows, "<i8").tobytes()).hexdigest()
        metadata = {"split": SPLIT, "prompts": len(self.rows), "seed": self.seed, "rows_sha256": digest}
        sampling = {"timesteps": self.timesteps, "guidance": self.guidance} if self.timesteps else {}
        graph.metadata_props.add(key=METADATA, value=json.dumps({**metadata, **sampling}, sort_keys=True))


@dataclass(frozen=True)
class ComponentInputs:
    """`CalibrationInputs` of the graph ``file`` of a ``model``."""

    model: OnnxModel
    file: str
    context: Context

    @property
    def part(self) -> str:
        """Folder of the graph."""
        return self.file.partition("/")[0]

    @cached_property
    def _session(self) -> DiffusionSession:
        return open_diffusion(self.model)

    def choose(self, count: int) -> ComponentCalibration:
        """See `CalibrationInputs.choose`: uses as many prompts as give ``count`` examples."""
        rows = self.context.data.split(SPLIT)
        if len(rows) == 0:
            raise DataError("The train split is empty, so there is nothing to calibrate with.", where=f"split {SPLIT}")
        num_prompts = count_prompts(self._session.sampler, self.part, count)
        # Only chosen rows are encoded, because encoding samples noise for each.
        lengths = np.array([len(text) for text in rows["text"].to_pylist()])
        classes = np.unique(rows["label"].to_pylist(), return_inverse=True)[1] if "label" in rows.column_names else None
        chosen = spread_sample(lengths, classes, num_prompts, self.context.seed)
        examples = self.context.task.encode(rows.take(chosen), processor_of(self.model), None, self.context.max_length)
        batch = examples.batch(range(len(examples)))
        return record_inputs(self._session, self.part, batch, chosen, self.context.seed)

    def merit(self) -> Merit:
        """See `CalibrationInputs.merit`: SSIM of images generated with a changed graph to those of the model itself."""
        examples = validation_examples(self.model, self.context)
        batches = [examples.batch(indices) for indices in by_length(examples, _IMAGE_BATCH)]
        expected = [self._session.predict(batch)[IMAGES] for batch in batches]

        def merit(graph: onnx.ModelProto) -> float:
            session = self._session.with_part(self.part, session_of(graph, alone=False))
            images = [session.predict(batch)[IMAGES] for batch in batches]
            return float(np.concatenate([ssim(*pair) for pair in zip(images, expected, strict=True)]).mean())

        return merit


def count_prompts(sampler: DiffusionSampler, part: str, count: int) -> int:
    """Return the number of prompts that give ``count`` examples of a component."""
    if part in (TEXT_ENCODER, DECODER):
        return count if part == TEXT_ENCODER else min(count, _MAX_IMAGES)
    # A prompt is a row in each recorded call of the denoiser, and guidance adds a row of the empty prompt.
    rows_per_prompt = min(sampler.sampling.steps, TIMESTEPS) * (2 if sampler.guided else 1)
    return max(1, -(-count // rows_per_prompt))


def record_inputs(
    session: DiffusionSession, part: str, batch: Batch, rows: Sequence[int] | np.ndarray, seed: int
) -> ComponentCalibration:
    """Generate images of a batch and record the inputs of a component.

    Args:
        session: Session of the whole model.
        part: Folder of the component.
        batch: Prompts and noise.
        rows: Rows of the prompts in the train split.
        seed: Seed that the prompts were chosen with.
    """
    guidance, recorder = session.sampler.sampling.guidance, RecordingSession(session.parts[part])
    if part == TEXT_ENCODER:
        # Its inputs are those of the session, so nothing has to run.
        return ComponentCalibration([{IDS: ids[np.newaxis]} for ids in batch[IDS]], rows, seed, guidance)
    session.with_part(part, recorder).predict(batch)
    if part == DECODER:
        (feed,) = recorder.calls
        return ComponentCalibration([{LATENT: row[np.newaxis]} for row in feed[LATENT]], rows, seed, guidance)
    feeds = [recorder.calls[index] for index in spaced_indices(len(recorder.calls), TIMESTEPS)]
    return ComponentCalibration(feeds, rows, seed, guidance, tuple(float(feed[TIMESTEP].item()) for feed in feeds))


def spaced_indices(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices below ``length``: the first, the last, and evenly between."""
    return [int(index) for index in np.round(np.linspace(0, length - 1, min(length, count)))]


def component_inputs(session: DiffusionSession, component: str, batch: Batch, count: int) -> list[Batch]:
    """Return the inputs of at most ``count`` calls of a component, spread evenly over the generation of a batch.

    Args:
        session: Session of the whole model.
        component: Folder of the component.
        batch: Prompts and noise.
        count: Largest number of calls.
    """
    feeds = record_inputs(session, component, batch, range(len(batch[IDS])), 0).feeds
    return [feeds[index] for index in spaced_indices(len(feeds), count)]
