"""Stage runner: takes each stage's output from the cache, or runs the stage, checks its output and stores it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.formats.onnx.model import OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.models.model import Model, TorchModel
from compress.models.pipeline_folder import is_pipeline
from compress.pipeline.cache import Cache, Entry
from compress.pipeline.integrity import IntegrityCheck, PredictionProbe, inspector_of, measure_size
from compress.pipeline.keys import Keys
from compress.pipeline.run_inputs import RunInputs
from compress.recipe.recipe import START, Recipe
from compress.results.report import IntegrityRecord, StageRecord
from compress.stages.base import AnyStage, Context
from compress.stages.protocols import Trains, loaded_type
from compress.stages.training.processes import first_says, is_first, num_processes, wait_for_all
from compress.utils.errors import CompressError, DeviceError, StageError, StorageError, first_line
from compress.utils.progress import NotesAsDetails, Progress
from compress.utils.resource_meter import metered
from compress.utils.storage import digest_directory, disk_full, size_bytes
from compress.utils.torch_device import CPU, describe_device, use_device


@dataclass(frozen=True)
class StageResult:
    """Cache entry of a stage's output, with its records for the report."""

    entry: Entry
    record: StageRecord
    integrity: tuple[IntegrityRecord, ...]


@dataclass
class StageRunner:
    """Runs the stages of one recipe in order, each on the files of the stage before it."""

    recipe: Recipe
    recipe_folder: Path
    artifacts: Path
    progress: Progress
    results: dict[str, StageResult] = field(default_factory=dict)
    extra_results: dict[str, tuple[AnyStage, StageResult]] = field(default_factory=dict)
    """Results of stages that are not part of the recipe, by label (`run_extra`)."""
    measurement_entries: list[tuple[Entry, bool]] = field(default_factory=list)
    """Cache entries of measurements, each with whether it was in the cache before."""

    def __post_init__(self) -> None:
        """Resolve values that depend on the processor once, so that keys and stages use the same ones."""
        self.recipe = self.recipe.resolved()
        self.inputs = RunInputs(self.recipe, self.recipe_folder, self.artifacts / "cache" / "models", self.progress)

    @cached_property
    def cache(self) -> Cache:
        """Return the cache that all runs below the artifacts folder share."""
        return Cache(self.artifacts / "cache")

    @cached_property
    def keys(self) -> Keys:
        """Return the cache keys. The files of each model are digested once."""
        digest = functools.cache(lambda reference: digest_directory(self.inputs.resolve(reference)))
        folders = functools.cache(lambda reference: digest_directory(self.inputs.locate(reference)))
        return Keys(self.recipe, self.inputs.data, digest, folders, self.inputs.device)

    def run_all(self) -> None:
        """Run every stage. Raises `StageError`; outputs of finished stages stay in the cache."""
        for index, label in enumerate(self.recipe.labels()):
            self.progress.note(f"[{index + 1}/{len(self.recipe.stages)}] {label}")
            self.run_stage(label)

    def run_stage(self, label: str) -> StageResult:
        """Run one stage, whose earlier stages have results already."""
        apply = self._apply_in_all_processes if num_processes() > 1 else self._apply
        with use_device(self.inputs.device):
            result = self.results[label] = apply(label, *self._stage_and_input(label))
        return result

    def use_cached(self, label: str, entry: Entry) -> None:
        """Use an existing output for a stage, from an earlier run or from another machine."""
        self.results[label] = _result(label, entry, cached=True)

    def run_extra(self, label: str, stage: AnyStage, input_label: str) -> None:
        """Apply a stage that is not part of the recipe to an output; its result gets ``label``."""
        self.extra_results[label] = stage, self._apply(label, stage, input_label)

    def stage_key(self, label: str) -> str:
        """Return the cache key of a stage whose earlier stages have results already."""
        return self._key(*self._stage_and_input(label))

    def input_labels(self, label: str) -> tuple[str, ...]:
        """Return the labels of the outputs that a stage reads."""
        stage, input_label = self._stage_and_input(label)
        return tuple(name for name in dict.fromkeys((input_label, *stage.earlier_outputs())) if name != START)

    def folder_of(self, label: str) -> Path:
        """Return the folder of a stage's output, or of the starting model."""
        return self.inputs.start if label == START else self._entry(label).folder

    def digest_of(self, label: str) -> str:
        """Return the digest of a stage's output files, or of the starting model."""
        return self.keys.start() if label == START else self._entry(label).digest

    def load(self, label: str, model_type: type[Any] = TorchModel) -> Model:
        """Return a new copy of a stage's output, or of the starting model with a seeded head.

        An output in the Hugging Face layout is loaded as ``model_type``: a whole `TorchModel`, or a `Checkpoint` that
        is read tensor by tensor.
        """
        folder = self.folder_of(label)
        stored_type: type[Any] = OnnxModel if self.inputs.from_graph else TorchModel
        if label != START:
            extra = self.extra_results.get(label)
            stored_type = (extra[0] if extra else self._stage_and_input(label)[0]).output_type
        # The stage's own type wins if it is a kind of checkpoint, since it may know more than `Checkpoint`.
        if model_type is Checkpoint and stored_type is not OnnxModel:
            stored_type = stored_type if issubclass(stored_type, Checkpoint) else Checkpoint
        elif model_type is TorchModel and stored_type is Checkpoint:
            stored_type = TorchModel
        if label == START and stored_type is TorchModel:
            import torch

            # The task's head may be new: its weights must not depend on anything that ran before.
            torch.manual_seed(self.recipe.seed)
            return self.inputs.task.load(folder, self.inputs.data.labels, self.recipe.trust_remote_code)
        model: Model = stored_type.load(folder, self.inputs.task)
        return model

    def context(self, key: str) -> Context:
        """Return the context of the stage whose output has that cache key."""
        return Context(
            task=self.inputs.task,
            data=self.inputs.data,
            max_length=self.recipe.data.max_length,
            seed=self.recipe.seed,
            progress=self.progress,
            earlier=self._load_torch,
            resolve=self.inputs.resolve,
            scratch=self.cache.scratch(key),
            locate=self.inputs.locate,
            shared=self.cache.scratch,
        )

    def _load_torch(self, label: str) -> TorchModel:
        model = self.load(label)
        if not isinstance(model, TorchModel):
            raise StageError(f"{label!r} gives an ONNX model; a torch model is needed.")
        return model

    def _stage_and_input(self, label: str) -> tuple[AnyStage, str]:
        """Return a stage of the recipe and the label of its input."""
        index = self.recipe.labels().index(label)
        return self.recipe.stages[index], self.recipe.labels()[index - 1] if index else START

    def _entry(self, label: str) -> Entry:
        return (self.extra_results[label][1] if label in self.extra_results else self.results[label]).entry

    def _key(self, stage: AnyStage, input_label: str) -> str:
        referred = [self.digest_of(label) for label in stage.earlier_outputs()]
        return self.keys.stage(stage, self.digest_of(input_label), referred)

    def _apply(self, label: str, stage: AnyStage, input_label: str) -> StageResult:
        """Return the output of ``stage`` from the cache, or run it."""
        key = self._key(stage, input_label)
        entry, cached = self.cache.obtain(
            key,
            functools.partial(self._execute, label, stage, input_label, key),
            on_damage=self.progress.note,
            on_wait=lambda: self.progress.note(f"{label}: waiting for another run that computes this stage"),
        )
        # The entry is complete, so half-finished work on it has no use.
        self.cache.drop_scratch(key)
        if cached:
            show = self.progress.note if label in self.recipe.labels() else self.progress.detail
            show(f"{label}: from the cache")
        return _result(label, entry, cached)

    def _apply_in_all_processes(self, label: str, stage: AnyStage, input_label: str) -> StageResult:
        """Apply a stage in each of several launched processes: all of them train, the first one stores the output."""
        key = self._key(stage, input_label)
        # All processes must take the same branch, so the first one looks into the cache for all.
        done = first_says(self.cache.find(key) is not None)
        if is_first():
            result = self._apply(label, stage, input_label)
            wait_for_all()
            return result
        # The other processes take part in training. Stages that do not train run in the first process alone.
        if not done and isinstance(stage, Trains):
            stage.run(self.load(input_label, loaded_type(stage, self.inputs.task.capabilities)), self.context(key))
        wait_for_all()
        entry = self.cache.find(key)
        if entry is None:
            raise StageError(f"Stage {label!r}: the first process left no output.")
        return _result(label, entry, cached=done)

    def _execute(self, label: str, stage: AnyStage, input_label: str, key: str, content: Path) -> Mapping[str, Any]:
        """Run a stage, write its output into ``content``, check it, and return the record of the cache entry."""
        with metered() as meter:
            model = self.load(input_label, loaded_type(stage, self.inputs.task.capabilities))
            with meter.checking():
                # Before the stage runs, since it may change the model in place.
                digests = inspector_of(model).digests()
            spec, context = stage.output_spec(), self.context(key)
            if label not in self.recipe.labels():
                self.progress.note(f"measure: writing {label}")
                context = replace(context, progress=NotesAsDetails(self.progress))
            # A graph from another tool may have no tensor that the stage shrinks, so its size may stay the same.
            if self.inputs.from_graph and spec.max_size_ratio is not None:
                spec = replace(spec, max_size_ratio=1.0)
            check = IntegrityCheck(label, spec)
            try:
                with use_device(self.inputs.device) as use:
                    output = stage.run(model, context)
                if use.was_used and self.inputs.device != CPU:
                    context.note(f"computed on {describe_device(self.inputs.device)}")
                # The checks read the files that were just written, because these are shipped.
                output.save(content)
                with meter.checking():
                    task, data = self.inputs.task, self.inputs.data
                    probe = PredictionProbe.of_task(task, data, self.recipe.data.max_length, type(output))
                    input_size = measure_size(self.folder_of(input_label), self.model_bytes(input_label))
                    check.check(output, digests, input_size, content, probe)
            # Name the stage in the error, since the library's own message does not.
            except DeviceError as error:
                raise DeviceError(f"Stage {label!r}: {error.what}", hint=error.hint) from error
            except CompressError as error:
                # The same stage would fail on the same input again; a disk may have room by then.
                if not isinstance(error, StorageError):
                    self.cache.drop_scratch(key)
                raise
            except library_failures() as error:
                if "No space left on device" in str(error):
                    raise disk_full(content) from error
                raise StageError(
                    f"Stage {label!r} failed: {type(error).__name__}: {first_line(error)}",
                    hint="see run.log in the run's folder; finished stages are kept, so the next run resumes here",
                ) from error
        return {
            "name": label,
            "stage": stage.model_dump(mode="json"),
            "seconds": meter.seconds,
            "check_seconds": meter.check_seconds,
            "peak_rss_bytes": meter.peak_rss_bytes,
            "integrity": check.findings,
            "remarks": context.notes,
            "tables": [table.model_dump(mode="json") for table in context.tables],
        }

    def model_bytes(self, label: str) -> int:
        """Return the bytes of an output, or of the starting model: only the top level of a snapshot belongs to it."""
        folder = self.folder_of(label)
        if label != START or self.inputs.from_graph or is_pipeline(folder):
            return size_bytes(folder)
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _result(label: str, entry: Entry, cached: bool) -> StageResult:
    """Return a stage's result from its cache entry. A cached stage took no time in this run."""
    record = StageRecord(
        name=label,
        key=entry.key,
        cached=cached,
        seconds=0.0 if cached else entry.record["seconds"],
        check_seconds=0.0 if cached else entry.record["check_seconds"],
        peak_rss_bytes=entry.record["peak_rss_bytes"],
        remarks=tuple(entry.record.get("remarks", ())),
        tables=tuple(entry.record.get("tables", ())),
    )
    integrity = tuple(
        IntegrityRecord(stage=label, check=check, found=text) for check, text in entry.record["integrity"]
    )
    return StageResult(entry, record, integrity)


def library_failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of libraries that stages call. File errors are left out: the cache reports them."""
    from onnx.checker import ValidationError
    from safetensors import SafetensorError

    from compress.formats.onnx.runtimes.onnxruntime import FAILURES

    failures = (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError)
    return (*failures, ValueError, ValidationError, SafetensorError, *FAILURES)
