"""What the parts of a model are given while it draws pictures: the inputs that their 8-bit ranges are found on.

A denoiser's activations are not the same at the noise where it begins and at the picture where it ends, so that
ranges from one end clip at the other. Examples are therefore the inputs of real sampling, with the guidance that
pictures will be drawn with, taken at steps that lie evenly over all of the way (Q-Diffusion, Li et al. 2023, section
4.1). A range holds for all steps: ONNX Runtime's integer kernels have their scales stored.
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
from compress.formats.runtime import Batch, Session
from compress.models.processor import processor_of
from compress.numerics.sampling import spread_sample
from compress.plugins.diffusion.image_similarity import ssim
from compress.plugins.diffusion.onnx_export import open_diffusion
from compress.plugins.diffusion.sampler import IDS, LATENT, PICTURES, TIMESTEP, PictureSampler
from compress.plugins.diffusion.session import DECODER, TEXT_ENCODER, PictureSession
from compress.stages.onnx_int8.accuracy_aware import Merit
from compress.stages.onnx_int8.quantizer import METADATA, SPLIT, validation_examples
from compress.tasks.tokens import by_length
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from compress.stages.base import Context

TIMESTEPS = 25
"""Steps of a trajectory that examples are taken at; Li et al. take 20 of 100, and 25 of 50."""
_MOST_PICTURES = 32
"""Those whose latents are enough to find what a decoder of pictures is given."""
_DRAWN_AT_ONCE = 32


@dataclass(frozen=True)
class PictureCalibration:
    """One feed for each call of a part. ``timesteps`` are those at which the denoiser was watched, if it was.

    ``rows`` are the places of the prompts in the train split.
    """

    feeds: Sequence[Batch]
    rows: Sequence[int] | np.ndarray
    seed: int
    guidance: float
    timesteps: tuple[float, ...] = ()

    def __str__(self) -> str:
        when = f" at {len(self.timesteps)} timesteps with guidance {self.guidance:g}" if self.timesteps else ""
        return f"{len(self.rows)} prompts{when}, seed {self.seed}"

    def calls(self) -> dict[str, Batch]:
        """The feeds by what each is: the denoiser's by timestep, the others' by number."""
        names = [f"timestep {when:g}" for when in self.timesteps]
        return dict(zip(names or [f"call {place + 1}" for place in range(len(self.feeds))], self.feeds, strict=True))

    def record(self, graph: onnx.ModelProto) -> None:
        """Write into ``graph``, in place, what it was calibrated on."""
        digest = hashlib.sha256(np.asarray(self.rows, "<i8").tobytes()).hexdigest()
        facts = {"split": SPLIT, "prompts": len(self.rows), "seed": self.seed, "rows_sha256": digest}
        way = {"timesteps": self.timesteps, "guidance": self.guidance} if self.timesteps else {}
        graph.metadata_props.add(key=METADATA, value=json.dumps({**facts, **way}, sort_keys=True))


@dataclass(frozen=True)
class PictureInputs:
    """See `CalibrationInputs`: what the graph ``file`` of a ``model`` is given while all of it draws."""

    model: OnnxModel
    file: str
    context: Context

    @property
    def part(self) -> str:
        """The folder of the graph."""
        return self.file.partition("/")[0]

    @cached_property
    def _session(self) -> PictureSession:
        return open_diffusion(self.model)

    def choose(self, count: int) -> PictureCalibration:
        """See `CalibrationInputs.choose`: as many prompts as give ``count`` examples of the part."""
        rows = self.context.data.split(SPLIT)
        if len(rows) == 0:
            raise DataError("The train split is empty, so there is nothing to calibrate with.", where=f"split {SPLIT}")
        needed = prompts_needed(self._session.sampler, self.part, count)
        # Only those that are chosen are encoded: noise is drawn for each.
        lengths = np.array([len(text) for text in rows["text"].to_pylist()])
        kinds = np.unique(rows["label"].to_pylist(), return_inverse=True)[1] if "label" in rows.column_names else None
        chosen = spread_sample(lengths, kinds, needed, self.context.seed)
        examples = self.context.task.encode(rows.take(chosen), processor_of(self.model), None, self.context.max_length)
        return watch(self._session, self.part, examples.batch(range(len(examples))), chosen, self.context.seed)

    def merit(self) -> Merit:
        """See `CalibrationInputs.merit`: SSIM of pictures drawn with a graph in the place of the part to the model's own."""
        examples = validation_examples(self.model, self.context)
        batches = [examples.batch(places) for places in by_length(examples, _DRAWN_AT_ONCE)]
        expected = [self._session.predict(batch)[PICTURES] for batch in batches]

        def merit(graph: onnx.ModelProto) -> float:
            session = self._session.with_part(self.part, session_of(graph, alone=False))
            found = [session.predict(batch)[PICTURES] for batch in batches]
            return float(np.concatenate([ssim(*pair) for pair in zip(found, expected, strict=True)]).mean())

        return merit


class _Watched:
    """A part that keeps what it is given."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.feeds: list[Batch] = []
        self.inputs, self.input_types, self.output_types = session.inputs, session.input_types, session.output_types
        self.provider, self.settings = session.provider, session.settings

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        self.feeds.append({name: np.array(array) for name, array in batch.items()})
        return self._session.predict(batch)


def prompts_needed(sampler: PictureSampler, part: str, count: int) -> int:
    """How many prompts give ``count`` examples: each is in several calls of a denoiser, with guidance as two rows."""
    if part == TEXT_ENCODER:
        return count
    if part == DECODER:
        return min(count, _MOST_PICTURES)
    each = min(sampler.sampling.steps, TIMESTEPS) * (2 if sampler.guided else 1)
    return max(1, -(-count // each))


def watch(
    session: PictureSession, part: str, batch: Batch, rows: Sequence[int] | np.ndarray, seed: int
) -> PictureCalibration:
    """Draw pictures for a ``batch`` of prompts and noise, and keep what a part is given.

    ``rows`` are the places of the prompts in the train split, ``seed`` is what they were chosen by.
    """
    guidance, watched = session.sampler.sampling.guidance, _Watched(session.parts[part])
    if part == TEXT_ENCODER:
        return PictureCalibration([{IDS: ids[np.newaxis]} for ids in batch[IDS]], rows, seed, guidance)
    session.with_part(part, watched).predict(batch)
    if part == DECODER:
        (whole,) = watched.feeds
        return PictureCalibration([{LATENT: one[np.newaxis]} for one in whole[LATENT]], rows, seed, guidance)
    feeds = [watched.feeds[place] for place in evenly(len(watched.feeds), TIMESTEPS)]
    return PictureCalibration(feeds, rows, seed, guidance, tuple(float(feed[TIMESTEP].item()) for feed in feeds))


def evenly(calls: int, most: int) -> list[int]:
    """Places of ``most`` of so many calls, or all of them: the first, the last, and evenly between."""
    return [int(place) for place in np.round(np.linspace(0, calls - 1, min(calls, most)))]


def component_inputs(session: PictureSession, component: str, batch: Batch, count: int) -> list[Batch]:
    """Return the inputs of at most ``count`` calls of a component, spread evenly over the generation of a batch."""
    feeds = watch(session, component, batch, range(len(batch[IDS])), 0).feeds
    return [feeds[call] for call in evenly(len(feeds), count)]
