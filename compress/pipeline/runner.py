"""Running a recipe's stages: find each output in the cache, or make it, check it and keep it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.data.dataset import Dataset, load_dataset
from compress.data.instructions import Instruction, find_instructions
from compress.data.judged import Question, RatedPairs, find_questions, find_rated_pairs
from compress.data.slices import Slice, extra_columns
from compress.data.source import find
from compress.formats.onnx.model import OnnxModel
from compress.formats.probed import TOKENS, WINDOWS
from compress.models.checkpoint import Checkpoint
from compress.models.diffusion_checks import is_pipeline
from compress.models.folder_checks import check_weights_finite
from compress.models.json_file import read_json
from compress.models.model import Model
from compress.models.torch_model import TorchModel
from compress.pipeline.cache import Cache, Entry
from compress.pipeline.integrity import PROBES, Contract, Probe, Weight, probed, weigh
from compress.pipeline.keys import Keys
from compress.pipeline.recipe_sources import resolved
from compress.recipe.recipe import START, Recipe
from compress.results.report import IntegrityRecord, StageRecord
from compress.sources.onnx_file import onnx_file
from compress.stages.base import Context, Promise, Stage
from compress.stages.training.processes import first_says, is_first, own_device, several, wait_for_all
from compress.tasks.capability import READS_ROWS
from compress.tasks.registry import get_task
from compress.tasks.task import Examples, Task
from compress.utils.digests import digest_directory
from compress.utils.errors import CompressError, DeviceError, InputError, StageError, StorageError
from compress.utils.progress import Progress
from compress.utils.resource_meter import metered
from compress.utils.storage import disk_full
from compress.utils.torch_device import CPU, computing_on, describe_device, find_device


@dataclass(frozen=True)
class Finished:
    """A stage's output in the cache, and what the report says of it."""

    entry: Entry
    record: StageRecord
    integrity: tuple[IntegrityRecord, ...]


@dataclass
class StageRunner:
    """One recipe on its way; stages run in order, each from the files of the one before it."""

    recipe: Recipe
    folder: Path
    artifacts: Path
    progress: Progress
    finished: dict[str, Finished] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)
    further: dict[str, tuple[Stage[Any, Any], Finished]] = field(default_factory=dict)
    """What outputs were taken through beside the recipe's own stages, by label (`apply_extra`)."""
    measured: list[tuple[Entry, bool]] = field(default_factory=list)
    """Measurements that were asked for on the way, each with whether the cache had it."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Where folders lie that the recipe names, of those that were brought here from elsewhere."""

    def __post_init__(self) -> None:
        """Processors are looked at once, so that keys and stages go by the same."""
        self.recipe = self.recipe.settled()

    @cached_property
    def cache(self) -> Cache:
        """The cache that all runs below the artifacts folder share."""
        return Cache(self.artifacts / "cache")

    @cached_property
    def task(self) -> Task:
        """The recipe's task, of the kind that its model is for."""
        task = get_task(self.recipe.task)
        return task if len(task.kinds()) == 1 else task.of(read_json(self.start / "config.json"))

    @cached_property
    def data(self) -> Dataset:
        """The recipe's data, read and checked once, with the columns that slices read."""
        columns = self.task.columns
        extra = extra_columns(self.slices, (column.name for column in columns))
        return load_dataset(self.recipe.data, columns, self.folder, self.progress, extra)

    @cached_property
    def questions(self) -> list[Question]:
        """The recipe's multiple-choice questions, read and checked once; none where it names no file."""
        reference = self.recipe.evaluation.questions
        return [] if reference is None else find_questions(reference, self.folder, self.progress)

    @cached_property
    def instructions(self) -> list[Instruction]:
        """What chat models are asked, read and checked once; none where the recipe names none."""
        reference = self.recipe.evaluation.instructions
        return [] if reference is None else find_instructions(reference, self.folder)

    @cached_property
    def rated_pairs(self) -> list[RatedPairs]:
        """Pairs with human similarities, read and checked once; none where the recipe names none."""
        reference = self.recipe.evaluation.similarity
        return [] if reference is None else find_rated_pairs(reference, self.folder, self.progress)

    @cached_property
    def judge(self) -> Path | None:
        """The folder of the classifier that judges pictures; none where the recipe names none."""
        reference = self.recipe.evaluation.judge
        return None if reference is None else self.resolve(reference)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The recipe's slices, or the task's where it names none."""
        return self.task.slices if self.recipe.slices is None else self.recipe.slices

    @cached_property
    def start(self) -> Path:
        """The folder of the starting model."""
        return self.resolve(self.recipe.model)

    @cached_property
    def starts_as(self) -> type[Any]:
        """The class of the starting model: a torch model, or a graph that somebody else wrote."""
        return OnnxModel if onnx_file(self.start) is not None else TorchModel

    @property
    def from_graph(self) -> bool:
        """Whether the starting model is a graph that somebody else wrote."""
        return self.starts_as is not TorchModel

    @cached_property
    def keys(self) -> Keys:
        """The cache keys; each model's files are read for them once."""
        digest = functools.cache(lambda reference: digest_directory(self.resolve(reference)))
        folders = functools.cache(lambda reference: digest_directory(self.locate(reference)))
        return Keys(self.recipe, self.data, digest, folders, self.device)

    @cached_property
    def device(self) -> str:
        """What stages compute on that can. Raises `InputError` where the recipe's isn't here."""
        return own_device(find_device(self.recipe.device))

    def resolve(self, reference: str) -> Path:
        """A model reference of the recipe as a local folder, checked. Raises `ModelError` or `SampleError`."""
        if reference not in self.models:
            folder = resolved(reference, self.recipe, self.folder, self.cache.root / "models", self.progress)
            if onnx_file(folder) is None:
                check_weights_finite(folder, self.progress)
            self.models[reference] = folder
        return self.models[reference]

    def locate(self, reference: str) -> Path:
        """A local folder that the recipe names, absolute or beside the recipe. Raises `InputError`."""
        found = self.folders.get(reference) or find(reference, self.folder)
        if found is None or not found.is_dir():
            raise InputError(f"There is no folder {reference!r}.", where=str(self.folder), hint="check the path")
        return found

    def travel(self) -> None:
        """Run every stage. Raises `StageError`; finished stages stay in the cache."""
        for index, label in enumerate(self.recipe.labels()):
            self.progress.note(f"[{index + 1}/{len(self.recipe.stages)}] {label}")
            self.take(label)

    def take(self, label: str) -> Finished:
        """Run one stage, those before it having been taken."""
        apply = self._apply_together if several() else self.apply
        with computing_on(self.device):
            found = self.finished[label] = apply(label, *self._step(label))
        return found

    def key(self, label: str) -> str:
        """The cache key of a stage, those before it having been taken."""
        return self._key(*self._step(label))

    def adopt(self, label: str, entry: Entry) -> None:
        """Go by an output that was made before, or elsewhere."""
        self.finished[label] = self._finished(label, entry, cached=True)

    def reads(self, label: str) -> tuple[str, ...]:
        """Labels of the outputs that a stage reads."""
        stage, before = self._step(label)
        return tuple(one for one in dict.fromkeys((before, *stage.refers_to())) if one != START)

    def _step(self, label: str) -> tuple[Stage[Any, Any], str]:
        """A stage, and the label of the one before it."""
        place = self.recipe.labels().index(label)
        return self.recipe.stages[place], self.recipe.labels()[place - 1] if place else START

    def apply_extra(self, label: str, stage: Stage[Any, Any], before: str) -> None:
        """Take the output of ``before`` through a stage that is none of the recipe's; it is ``label`` from then on."""
        self.further[label] = stage, self.apply(label, stage, before)

    def folder_of(self, label: str) -> Path:
        """The files of a finished stage's output, or of the starting model."""
        return self.start if label == START else self._entry(label).folder

    def _entry(self, label: str) -> Entry:
        return (self.further[label][1] if label in self.further else self.finished[label]).entry

    def digest(self, label: str) -> str:
        """Digest of a finished stage's files, or of the starting model."""
        return self.keys.start() if label == START else self._entry(label).digest

    def apply(self, label: str, stage: Stage[Any, Any], before: str) -> Finished:
        """The output of ``stage`` on the output of ``before``: from the cache, or made now."""
        key = self._key(stage, before)
        entry, cached = self.cache.obtain(
            key,
            lambda content: self._make(label, stage, before, key, content),
            on_damage=self.progress.note,
            on_wait=lambda: self.progress.note(f"{label}: another run is at it; waiting"),
        )
        self.cache.drop_scratch(key)
        if cached:
            self.progress.note(f"{label}: from the cache")
        return self._finished(label, entry, cached)

    def _key(self, stage: Stage[Any, Any], before: str) -> str:
        return self.keys.stage(stage, self.digest(before), [self.digest(other) for other in stage.refers_to()])

    def _apply_together(self, label: str, stage: Stage[Any, Any], before: str) -> Finished:
        """`apply` in several launched processes: all of them train, and the first one's output counts."""
        key = self._key(stage, before)
        done = first_says(self.cache.find(key) is not None)
        if is_first():
            finished = self.apply(label, stage, before)
            wait_for_all()
            return finished
        if not done and stage.trains:
            stage.run(self.load(before, stage.wants(self.task.capabilities)), self.context(key))
        wait_for_all()
        entry = self.cache.find(key)
        if entry is None:
            raise StageError(f"Stage {label!r}: the first process left no output.")
        return self._finished(label, entry, cached=done)

    def _finished(self, label: str, entry: Entry, cached: bool) -> Finished:
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
        found = tuple(
            IntegrityRecord(stage=label, check=check, found=text) for check, text in entry.record["integrity"]
        )
        return Finished(entry, record, found)

    def _make(self, label: str, stage: Stage[Any, Any], before: str, key: str, content: Path) -> Mapping[str, Any]:
        with metered() as meter:
            model = self.load(before, stage.wants(self.task.capabilities))
            with meter.checking():
                digests, weight = probed(model).digests(), self._weight(before)
            contract, context = Contract(label, self._promise(stage)), self.context(key)
            try:
                with computing_on(self.device) as use:
                    output = stage.run(model, context)
                if use.asked and self.device != CPU:
                    context.note(f"computed on {describe_device(self.device)}")
                output.save(content)
                with meter.checking():
                    contract.check(output, digests, weight, content, self._probe(type(output)))
            except DeviceError as error:
                raise DeviceError(f"Stage {label!r}: {error.what}", hint=error.hint) from error
            except CompressError as error:
                # The same stage would fail on the same input again; a disk may have room by then.
                if not isinstance(error, StorageError):
                    self.cache.drop_scratch(key)
                raise
            except library_failures() as error:
                raise _unexpected(label, content, error) from error
        return {
            "name": label,
            "stage": stage.model_dump(mode="json"),
            "seconds": meter.seconds,
            "check_seconds": meter.check_seconds,
            "peak_rss_bytes": meter.peak_rss_bytes,
            "integrity": contract.found,
            "remarks": context.notes,
            "tables": [table.model_dump(mode="json") for table in context.tables],
        }

    def load(self, label: str, wanted: type[Any] = TorchModel) -> Model:
        """A fresh copy of a finished stage's output, or of the starting model with a seeded head.

        What is kept as a Hugging Face folder is loaded as ``wanted``: whole, or to be read tensor by tensor.
        """
        folder = self.folder_of(label)
        gives = self.gives(label)
        if wanted is Checkpoint and gives is not OnnxModel:
            gives = gives if issubclass(gives, Checkpoint) else Checkpoint
        elif wanted is TorchModel and gives is Checkpoint:
            gives = TorchModel
        if label == START and gives is TorchModel:
            import torch

            torch.manual_seed(self.recipe.seed)
            return self.task.load(folder, self.data.labels, self.recipe.trust_remote_code)
        model: Model = gives.load(folder, self.task)
        return model

    def gives(self, label: str) -> type[Any]:
        """The model class that a stage gives, or that the starting model has."""
        if label == START:
            return self.starts_as
        if label in self.further:
            return self.further[label][0].gives()
        return self.recipe.stages[self.recipe.labels().index(label)].gives()

    def _promise(self, stage: Stage[Any, Any]) -> Promise:
        """What the stage promises; of a graph that somebody else wrote, any part may be none that it makes smaller."""
        promise = stage.promise()
        if not self.from_graph or promise.max_size_ratio is None:
            return promise
        return replace(promise, max_size_ratio=1.0)

    def _weight(self, label: str) -> Weight:
        if label != START or self.from_graph:
            return weigh(self.folder_of(label))
        if is_pipeline(self.start):
            return weigh(self.start)
        return weigh(self.start, sum(path.stat().st_size for path in self.start.iterdir() if path.is_file()))

    def _probe(self, kind: type[Any]) -> Probe:
        split = next((name for name in ("train", "validation") if name in self.data.splits), self.data.splits[0])
        rows = self.data.split(split).slice(0, PROBES)
        reads_rows = READS_ROWS in self.task.capabilities
        # Running text is cut into windows: few rows might not fill a long one, and fill very many short ones.
        length = self.recipe.data.max_length if reads_rows else min(self.recipe.data.max_length, TOKENS)

        def encode(processor: Any) -> Examples:
            examples = self.task.encode(rows, processor, None, length)
            return examples if reads_rows else replace(examples, inputs=examples.inputs[:WINDOWS])

        return Probe(load=lambda folder: kind.load(folder, self.task), encode=encode)

    def context(self, key: str) -> Context:
        """What a stage is given whose output has that key."""
        return Context(
            task=self.task,
            data=self.data,
            max_length=self.recipe.data.max_length,
            seed=self.recipe.seed,
            progress=self.progress,
            earlier=self._earlier,
            resolve=self.resolve,
            scratch=self.cache.scratch(key),
            locate=self.locate,
            shared=self.cache.scratch,
        )

    def _earlier(self, label: str) -> TorchModel:
        model = self.load(label)
        if not isinstance(model, TorchModel):
            raise StageError(f"{label!r} gives an ONNX model; a torch model is needed.")
        return model


def library_failures() -> tuple[type[Exception], ...]:
    """What the libraries that stages call raise, beside file errors: those say what they mean in the cache."""
    from onnx.checker import ValidationError
    from safetensors import SafetensorError

    from compress.formats.onnx.runtimes.onnxruntime import FAILURES

    own = (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
    return (*own, ValidationError, SafetensorError, *FAILURES)


def _unexpected(label: str, folder: Path, error: BaseException) -> CompressError:
    """A stage's failure with its label and how to go on; a full disk where that is what it was."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if "No space left on device" in str(error):
        return disk_full(folder)
    return StageError(
        f"Stage {label!r} failed: {type(error).__name__}: {first}",
        hint="see the run's log; finished stages are kept, so the next run resumes here",
    )
