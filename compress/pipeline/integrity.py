"""Integrity checks of every stage's output, made on the files just written, before they enter the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.dataset import Dataset
from compress.formats.integrity import (
    POSITIONS,
    TOKENS,
    WINDOWS,
    Encode,
    InspectedModel,
    ModelInspector,
    Stored,
    file_inspector,
    stored_arrays,
)
from compress.formats.registry import part_of
from compress.inspection.tensors import read_model
from compress.models.checkpoint import TABLES, Checkpoint
from compress.models.folder_checks import weight_files
from compress.models.model import Model, TorchModel
from compress.models.pipeline_folder import image_generation_hook
from compress.models.safetensors_file import read_header
from compress.stages.base import OutputSpec
from compress.tasks.capability import READS_ROWS
from compress.tasks.task import Examples, Task
from compress.utils.errors import IntegrityError, ModelError
from compress.utils.storage import size_bytes

if TYPE_CHECKING:
    from compress.models.model import Processor


PROBE_ROWS = 32
_SAME = 1e-5


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's files, and of its tensors alone, without graph and tokenizer."""

    files: int
    tensors: int


def measure_size(folder: Path, files: int | None = None) -> ModelSize:
    """Return the size of the model in ``folder``. A model without weight files counts by all of its files."""
    file_bytes = size_bytes(folder) if files is None else files
    try:
        tensor_bytes = sum(tensor.bytes for tensor in read_model(folder).tensors)
    except ModelError:
        tensor_bytes = 0
    return ModelSize(file_bytes, tensor_bytes or file_bytes)


@dataclass
class IntegrityCheck:
    """Checks of one stage's output. ``findings`` holds the result of each for the report, in order."""

    label: str
    spec: OutputSpec
    findings: list[tuple[str, str]] = field(default_factory=list)

    def check(
        self,
        model: Model,
        input_digests: Mapping[str, str],
        input_size: ModelSize,
        folder: Path,
        probe: PredictionProbe,
    ) -> None:
        """Check an output against what its stage guarantees.

        Args:
            model: The output in memory.
            input_digests: Digest of each tensor of the stage's input.
            input_size: Size of the stage's input.
            folder: The folder that the output was saved in.
            probe: Predictions for a few examples.

        Raises:
            IntegrityError: With the stage's label and a hint.
        """
        inspector = inspector_of(model)
        digests = inspector.digests()
        # Check tensors that the stage changed. Others passed before, or are infinite masks of an imported graph.
        changed = {name for name, digest in digests.items() if input_digests.get(name) != digest}
        for name, array in inspector_of(model).float_arrays():
            if name in changed and not np.isfinite(array).all():
                raise self._fail(
                    f"the tensor {name!r} holds NaN or infinite values.",
                    "lower the learning rate or set precision: fp32, and look at the stage's input",
                )
        self.findings.append(("weights finite", "all"))
        self._changed(input_digests, digests)
        self._size(input_size, measure_size(folder))
        reason = inspector.unavailable_reason()
        if reason is not None:
            self.findings.append(("predictions", f"not looked at: {reason}"))
            return
        outputs = probe.in_memory(model)
        # Check that predictions are finite and differ between examples.
        if not np.isfinite(outputs).all():
            raise self._fail("its predictions hold NaN or infinity.", "look at the stage's input and parameters")
        if len(outputs) > 1 and np.ptp(outputs, axis=0).max() == 0:
            raise self._fail("its predictions are all the same.", "compress less, or train longer afterwards")
        self.findings.append(("predictions", "finite and not constant"))
        # Check that the saved model predicts the same as the model in memory.
        reloaded = probe.from_disk(folder)
        difference = float(np.abs(outputs - reloaded).max())
        if not difference <= _SAME:
            raise self._fail(
                f"after saving and loading its predictions differ (a logit by {difference:.1e}).",
                "this is a defect of the stage; please report it with the recipe",
            )
        self.findings.append(("saved and loaded", f"logits differ by {difference:.0e}"))

    def _fail(self, what: str, hint: str) -> IntegrityError:
        """Return the error of a failed check."""
        return IntegrityError(f"Stage {self.label!r}: {what}", hint=hint)

    def _changed(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Check that at least one tensor changed, unless the stage need not change any."""
        if not self.spec.changes_weights:
            return
        changed = sum(before.get(name) != digest for name, digest in after.items()) + len(before.keys() - after.keys())
        if changed == 0:
            raise self._fail("no weight changed.", "check the stage's parameters: as set they have no effect")
        self.findings.append(("tensors changed", str(changed)))

    def _size(self, input_size: ModelSize, output_size: ModelSize) -> None:
        """Check that the tensors take no more bytes than the stage guarantees."""
        limit = self.spec.max_size_ratio
        self.findings.append(
            ("size", f"{output_size.files:,} bytes, {output_size.files / input_size.files:.1%} of its input")
        )
        if limit is not None and output_size.tensors > limit * input_size.tensors + self.spec.overhead_bytes:
            share = output_size.tensors / input_size.tensors
            raise self._fail(
                f"the result's tensors have {output_size.tensors:,} bytes, {share:.0%} of its input's; "
                f"the stage guarantees at most {limit:.0%}.",
                self.spec.hint or "look at `compress inspect` for the tensors that stayed large",
            )


@dataclass(frozen=True)
class PredictionProbe:
    """Predictions of a model for a few examples, from memory and from its files."""

    load: Callable[[Path], Model]
    encode: Callable[[Any], Examples]

    @classmethod
    def of_task(cls, task: Task, data: Dataset, max_length: int, model_type: type[Any]) -> PredictionProbe:
        """Return a probe with rows of the training split, or of another one if there is none.

        Args:
            task: Encodes the rows and loads the model.
            data: The recipe's data.
            max_length: Tokens of a sequence at most.
            model_type: The class that loads the output's files.
        """
        split = next((name for name in ("train", "validation") if name in data.splits), data.splits[0])
        rows = data.split(split).slice(0, PROBE_ROWS)
        reads_rows = READS_ROWS in task.capabilities
        # Running text is split into sequences: few rows may not fill a long one, and fill very many short ones.
        length = max_length if reads_rows else min(max_length, TOKENS)

        def encode(processor: Processor) -> Examples:
            examples = task.encode(rows, processor, None, length)
            return examples if reads_rows else replace(examples, inputs=examples.inputs[:WINDOWS])

        return cls(load=lambda folder: model_type.load(folder, task), encode=encode)

    def in_memory(self, model: Model) -> np.ndarray:
        """Return the logits of the model object itself, [n, ...]."""
        return inspector_of(model).logits(self.encode)

    def from_disk(self, folder: Path) -> np.ndarray:
        """Return the logits after loading ``folder`` again, [n, ...]."""
        return self.in_memory(self.load(folder))


def inspector_of(model: Model) -> InspectedModel:
    """Return the inspector for a model's class, which reads its tensors and computes its logits."""
    if isinstance(model, TorchModel):
        return InspectedModel(model, _MODULE)
    if isinstance(model, Checkpoint):
        return InspectedModel(model, _CHECKPOINT)
    inspector: ModelInspector = part_of(model.kind, "inspector") or file_inspector(model.kind)
    return InspectedModel(model, inspector)


def _torch_logits(model: TorchModel, encode: Encode) -> np.ndarray:
    """Return the logits of a module. An image generator generates a few images in very few steps instead."""
    from compress.tasks.inference import predict

    if model.generates_images:
        images: np.ndarray = image_generation_hook("open_torch")(model, {}).probe(encode(model.processor))
        return images
    return predict(model.module, encode(model.processor))


def _stored_tensors(model: Checkpoint) -> Stored:
    """Yield every tensor, mapped from its file, since a checkpoint may not fit in memory."""
    tables = model.folder / TABLES
    for file in (*weight_files(model.folder), *([tables] if tables.is_file() else [])):
        for tensor in read_header(file):
            yield tensor, tensor.data()


def _blockwise_logits(model: Checkpoint, encode: Encode) -> np.ndarray:
    """Return logits [positions, vocabulary] of the last positions, with one block in memory at a time."""
    import torch

    from compress.models.processor import load_processor, load_tokenizer
    from compress.stages.blockwise.blockwise_model import build_blockwise_model, last_hidden

    if model.config.get("is_encoder_decoder"):
        return _first_token_logits(model, encode(load_processor(model.folder)))
    decoder = build_blockwise_model(model)
    sequences = [example["input_ids"] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    length = min(TOKENS, *(len(sequence) for sequence in sequences))
    ids = torch.from_numpy(np.stack([sequence[:length] for sequence in sequences]))
    with torch.no_grad():
        logits = decoder.logits(last_hidden(decoder, ids)[:, -POSITIONS:])
    return np.asarray(logits.flatten(0, 1))


def _first_token_logits(model: Checkpoint, examples: Examples) -> np.ndarray:
    """Return logits [examples, vocabulary] of the first generated token of an encoder-decoder model."""
    import torch
    from transformers import AutoConfig

    from compress.models.meta_model import auto_class

    config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    module = auto_class(config).from_pretrained(model.folder, use_safetensors=True, dtype=torch.float32).eval()
    count = min(WINDOWS, len(examples))
    inputs = {name: torch.from_numpy(array) for name, array in examples.batch(range(count)).items()}
    start = torch.full((count, 1), config.decoder_start_token_id)
    with torch.no_grad():
        logits = module(**inputs, decoder_input_ids=start).logits[:, -1]
    return np.asarray(logits)


_MODULE = ModelInspector(
    lambda model: stored_arrays((name, tensor.numpy()) for name, tensor in model.tensors().items()), _torch_logits
)
_CHECKPOINT = ModelInspector(_stored_tensors, _blockwise_logits)
