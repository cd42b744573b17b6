"""The contract that every stage's output keeps, checked on the files just written, before they get their name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.probed import POSITIONS, TOKENS, WINDOWS, Encode, Probed, Probing, Stored, of_arrays, of_files
from compress.formats.registry import part_of
from compress.inspection.tensors import read_model
from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.diffusion_pipeline import GeneratorModel
from compress.models.folder_checks import weight_files
from compress.models.model import Model
from compress.models.safetensors_file import read_header
from compress.models.torch_model import TorchModel
from compress.stages.base import Promise
from compress.tasks.task import Examples
from compress.utils.digests import size_bytes
from compress.utils.errors import IntegrityError, ModelError

PROBES = 32
_SAME = 1e-5


@dataclass(frozen=True)
class Weight:
    """Bytes of a model's ``files``, and of the ``tensors`` in them, without graph and tokenizer, where it has any."""

    files: int
    tensors: int


def weigh(folder: Path, files: int | None = None) -> Weight:
    """A model's folder; of one that has no weights yet, as with `random_weights`, the files stand for the tensors."""
    found = size_bytes(folder) if files is None else files
    try:
        tensors = sum(tensor.bytes for tensor in read_model(folder).tensors)
    except ModelError:
        tensors = 0
    return Weight(found, tensors or found)


@dataclass
class Contract:
    """The checks of one stage, in order; ``found`` keeps what each of them saw, for the report."""

    label: str
    promise: Promise
    found: list[tuple[str, str]] = field(default_factory=list)

    def check(
        self,
        model: Model,
        before: Mapping[str, str],
        weight_before: Weight,
        folder: Path,
        probe: Probe,
    ) -> None:
        """Hold ``model``, saved in ``folder``, to the contract. ``before`` are the input's tensor digests.

        Raises `IntegrityError` with the stage's name and what to try.
        """
        after = probed(model).digests()
        self._finite(model, {name for name, digest in after.items() if before.get(name) != digest})
        self._changed(before, after)
        self._size(weight_before, weigh(folder))
        reason = probed(model).unavailable_reason()
        if reason is not None:
            self.found.append(("predictions", f"not looked at: {reason}"))
            return
        outputs = probe.in_memory(model)
        self._sane(outputs)
        self._reloads(outputs, probe.from_disk(folder))

    def _fail(self, what: str, hint: str) -> IntegrityError:
        return IntegrityError(f"Stage {self.label!r}: {what}", hint=hint)

    def _finite(self, model: Model, changed: Collection[str]) -> None:
        """What was there before was looked at then, and may be a mask in somebody's graph, which is infinite."""
        for name, array in probed(model).float_arrays():
            if name in changed and not np.isfinite(array).all():
                raise self._fail(
                    f"the tensor {name!r} holds NaN or infinite values.",
                    "lower the learning rate or set precision: fp32, and look at the stage's input",
                )
        self.found.append(("weights finite", "all"))

    def _changed(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        if not self.promise.changes_weights:
            return
        changed = sum(before.get(name) != digest for name, digest in after.items()) + len(before.keys() - after.keys())
        if changed == 0:
            raise self._fail("no weight changed.", "check the stage's parameters: as given they do nothing")
        self.found.append(("tensors changed", str(changed)))

    def _size(self, before: Weight, after: Weight) -> None:
        limit = self.promise.max_size_ratio
        self.found.append(("size", f"{after.files:,} bytes, {after.files / before.files:.1%} of its input"))
        if limit is not None and after.tensors > limit * before.tensors + self.promise.overhead_bytes:
            share = after.tensors / before.tensors
            raise self._fail(
                f"the result's tensors have {after.tensors:,} bytes, {share:.0%} of its input's; at most {limit:.0%} "
                "was promised.",
                self.promise.hint or "look at `compress inspect` for the tensors that stayed large",
            )

    def _sane(self, outputs: np.ndarray) -> None:
        if not np.isfinite(outputs).all():
            raise self._fail("its predictions hold NaN or infinite values.", "look at the stage's input and parameters")
        if len(outputs) > 1 and np.ptp(outputs, axis=0).max() == 0:
            raise self._fail("it predicts the same for every example.", "compress less, or train longer afterwards")
        self.found.append(("predictions", "finite and not constant"))

    def _reloads(self, expected: np.ndarray, reloaded: np.ndarray) -> None:
        difference = float(np.abs(expected - reloaded).max())
        if not difference <= _SAME:
            raise self._fail(
                f"once saved and loaded it predicts otherwise (a logit differs by {difference:.1e}).",
                "this is a defect of the stage; please report it with the recipe",
            )
        self.found.append(("saved and loaded", f"logits differ by {difference:.0e}"))


@dataclass(frozen=True)
class Probe:
    """How to get predictions of a model for a few examples, from memory and from its files."""

    load: Callable[[Path], Model]
    encode: Callable[[Any], Examples]

    def in_memory(self, model: Model) -> np.ndarray:
        """Logits of the model object itself, [n, ...]."""
        return probed(model).logits(self.encode)

    def from_disk(self, folder: Path) -> np.ndarray:
        """Logits after loading ``folder`` again, [n, ...]."""
        return self.in_memory(self.load(folder))


def probed(model: Model) -> Probed:
    """The way of looking into a model of its kind."""
    if isinstance(model, TorchModel):
        return _MODULE(model)
    if isinstance(model, Checkpoint):
        return _CHECKPOINT(model)
    found: Probing = part_of(model.kind, "probed") or of_files(model.kind)
    return found(model)


def _answers(model: TorchModel, encode: Encode) -> np.ndarray:
    """What the module itself answers; of one that draws a few pictures, in next to no steps."""
    from compress.tasks.forward import predict

    if isinstance(model, GeneratorModel):
        from compress.formats.safetensors.pictures import torch_pictures

        return torch_pictures(model, {}).probe(encode(model.processor))
    return predict(model.module, encode(model.processor))


def _stored(model: Checkpoint) -> Stored:
    """Every tensor, mapped from its file: a checkpoint need not fit in memory."""
    tables = model.folder / TABLES
    for file in (*weight_files(model.folder), *([tables] if tables.is_file() else [])):
        for tensor in read_header(file):
            yield tensor, tensor.data()


def _logits(model: Checkpoint, encode: Encode) -> np.ndarray:
    """Logits [positions, vocabulary] with one block in memory at a time."""
    import torch

    from compress.models.processor import load_processor, load_tokenizer
    from compress.stages.blockwise.build import build_skeleton, last_hidden

    if model.config.get("is_encoder_decoder"):
        return _first_logits(model, encode(load_processor(model.folder)))
    skeleton = build_skeleton(model)
    windows = [example["input_ids"] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    length = min(TOKENS, *(len(window) for window in windows))
    ids = torch.from_numpy(np.stack([window[:length] for window in windows]))
    with torch.no_grad():
        found = skeleton.logits(last_hidden(skeleton, ids)[:, -POSITIONS:])
    return np.asarray(found.flatten(0, 1))


def _first_logits(model: Checkpoint, examples: Examples) -> np.ndarray:
    """Of an encoder and a decoder, logits [probes, vocabulary] of the token that begins an answer."""
    import torch
    from transformers import AutoConfig

    from compress.models.meta_model import auto_class

    config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    whole = auto_class(config).from_pretrained(model.folder, use_safetensors=True, dtype=torch.float32).eval()
    batch = examples.batch(range(min(WINDOWS, len(examples))))
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    start = torch.full((min(WINDOWS, len(examples)), 1), config.decoder_start_token_id)
    with torch.no_grad():
        found = whole(**inputs, decoder_input_ids=start).logits[:, -1]
    return np.asarray(found)


_MODULE = Probing(lambda model: of_arrays((name, one.numpy()) for name, one in model.tensors().items()), _answers)
_CHECKPOINT = Probing(_stored, _logits)
