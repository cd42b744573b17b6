"""Process that benchmarks a recipe's training stages: `python -m compress.pipeline.stage_benchmark_process`."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress.data.dataset import load_dataset
from compress.formats.quiet_output import quiet_libraries
from compress.models.folder_checks import weight_files
from compress.models.json_file import read_json
from compress.models.model import TorchModel
from compress.pipeline.recipe_sources import count
from compress.pipeline.run_inputs import resolve_recipe_model
from compress.pipeline.stage_benchmark import REFUSED, StageBenchmarks, StageTiming
from compress.recipe.recipe import START, Recipe
from compress.stages.base import Context
from compress.stages.cost_model import Shape
from compress.stages.protocols import ReadsExamples, SizedByData, loaded_type
from compress.stages.training.settings import Training
from compress.tasks.inference import predict, tensors
from compress.tasks.registry import get_task
from compress.tasks.task import Examples, Task
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress, Total
from compress.utils.resource_meter import metered
from compress.utils.torch_device import resolve_device, use_device

Item = TypeVar("Item")
_FEW = 8
"""Examples of the pass that measures the time of a stage that does not depend on the number of examples."""
_BATCH_SIZE = 32
"""Examples of a batch for stages that read examples without a setting for it."""
_BATCHES, _SAMPLE_BATCHES = 2, 4
"""Batches of the benchmark, and batches among which the longest examples are selected for peak memory."""
_BUSY_SHARE, _THREAD_EFFICIENCY = 0.05, 0.93
"""Share of time waited for a core above which the machine counts as busy, and parallel efficiency of the threads."""
_FLOP_EXAMPLES, _FORWARD_EXAMPLES = 4, 64
"""Examples for counting FLOPs, and for timing a forward pass."""


class Clock:
    """Clock of computing time that other processes on the machine do not distort.

    On a busy machine threads wait for each other. Then one thread computes, its CPU time is measured, and the time of
    all threads is derived with `_THREAD_EFFICIENCY`.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.busy = _share_waited() > _BUSY_SHARE
        if self.busy:
            torch.set_num_threads(1)

    def now(self) -> float:
        """Return the time in seconds from an arbitrary start: wall time, or CPU time on a busy machine."""
        return time.process_time() if self.busy else time.perf_counter()

    def shared(self, seconds: float) -> float:
        """Return the seconds that all threads need for work that took ``seconds`` by this clock."""
        return seconds / max(_THREAD_EFFICIENCY * self.threads, 1.0) if self.busy else seconds


def _share_waited() -> float:
    """Return the share of its life that this thread waited for a core, or 0 where the system does not count it."""
    try:
        ran, waited = map(int, Path("/proc/thread-self/schedstat").read_text().split()[:2])
    except (OSError, ValueError):
        return 0.0
    return waited / max(ran + waited, 1)


@dataclass
class _Steps(SilentProgress):
    """Progress that measures the seconds of each tracked loop, by its description."""

    clock: Clock
    spent: dict[str, float] = field(default_factory=dict)

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``."""
        began = self.clock.now()
        yield from items
        self.spent[description] = self.spent.get(description, 0.0) + self.clock.now() - began


@dataclass
class StageBenchmarker:
    """Runs the stages of one recipe, whose files are all local, on a few batches each."""

    recipe: Recipe
    folder: Path
    scratch: Path

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.clock = Clock()
        began = self.clock.now()
        self.start = self._resolve(recipe.model)
        self.task: Task = get_task(recipe.task)
        if len(self.task.variants()) > 1:
            self.task = self.task.specialize(read_json(self.start / "config.json"))
        self.data = load_dataset(recipe.data, self.task.columns, self.folder, SilentProgress())
        torch.manual_seed(recipe.seed)
        model = self.task.load(self.start, self.data.labels, recipe.trust_remote_code)
        self.outputs: dict[str, TorchModel] = {START: model}
        self.ready_seconds = self.clock.now() - began

    def _resolve(self, reference: str) -> Path:
        return resolve_recipe_model(reference, self.recipe, self.folder, self.scratch / "models", SilentProgress())

    def run_all(self) -> Iterator[StageBenchmarks]:
        """Yield the timings so far, after the starting model and after each stage, in case a later one fails."""
        with metered() as meter:
            pass
        model, input_label = self.outputs[START], START
        batch = max(getattr(stage, "batch_size", 1) for stage in self.recipe.stages)
        # A random sample has the length distribution of the whole split.
        table = self.data.split("train")
        rows = np.random.default_rng(0).permutation(len(table))[: _SAMPLE_BATCHES * batch]
        began = self.clock.now()
        examples = self.task.encode(table.take(rows), model.processor, model.labels(), self.recipe.data.max_length)
        encoding = (self.clock.now() - began) / len(rows)
        few = [examples.inputs[index] for index in range(min(len(examples), _FORWARD_EXAMPLES))]
        benchmarks = StageBenchmarks(
            start=shape_of(model, self.start),
            uses=self._uses(model, examples),
            answer_seconds=self._answer_seconds(model, examples),
            encode_seconds=encoding,
            example_bytes=sum(array.nbytes for example in few for array in example.values()) / max(len(few), 1),
            ready_seconds=self.ready_seconds,
            ready_bytes=meter.peak_rss_bytes,
        )
        yield benchmarks
        # Padding makes the longest examples decide the peak memory.
        lengths = examples.lengths() if len(examples) == len(rows) else np.zeros(len(rows))
        longest = rows[np.argsort(-lengths, kind="stable")]
        for label, stage in zip(self.recipe.labels(), self.recipe.stages, strict=True):
            if isinstance(stage, Training | ReadsExamples):
                timing = self._time_training(label, stage, self.outputs[input_label], rows, longest, encoding)
                benchmarks = benchmarks.model_copy(update={"stages": {**benchmarks.stages, label: timing}})
                yield benchmarks
                if label not in self.outputs:
                    return
                input_label = label
            elif loaded_type(stage, self.task.capabilities) is TorchModel and stage.output_type() is TorchModel:
                # Other stages take little time, or need all rows. The stages after them are timed with their input,
                # unless they decide the shape of the model.
                self.outputs[label] = self.outputs[input_label]
                if isinstance(stage, SizedByData):
                    all_rows = np.arange(len(table))
                    seconds, _, peak, self.outputs[label] = self._run(stage, self.outputs[input_label], all_rows)
                    shape = shape_of(self.outputs[label], self.start)
                    timing = StageTiming(
                        seconds=seconds, example_seconds=0.0, step_seconds=0.0, peak_rss_bytes=peak, shape=shape
                    )
                    benchmarks = benchmarks.model_copy(update={"stages": {**benchmarks.stages, label: timing}})
                    yield benchmarks
                input_label = label
            else:
                return

    def _uses(self, model: TorchModel, examples: Examples) -> float:
        """Return how often each weight is multiplied per example, from the FLOPs of a forward pass."""
        few = list(range(min(_FLOP_EXAMPLES, len(examples))))
        batch = tensors(examples, few)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.module.eval()(**{name: batch[name] for name in examples.padding})
        # A multiplication and an addition per weight are two FLOPs.
        working = shape_of(model, self.start).working
        return float(counter.get_total_flops()) / (2 * max(working, 1.0) * len(few))

    def _answer_seconds(self, model: TorchModel, examples: Examples) -> float:
        """Return the seconds per example of a forward pass, after one that warms up."""
        few = examples.subset(range(min(_FORWARD_EXAMPLES, len(examples))))
        predict(model.module, few)
        began = self.clock.now()
        predict(model.module, few)
        seconds: float = self.clock.shared(self.clock.now() - began)
        return seconds / len(few)

    def _time_training(
        self, label: str, stage: Any, model: TorchModel, rows: np.ndarray, longest: np.ndarray, encoding: float
    ) -> StageTiming:
        """Return the timing of a training stage, from three short runs.

        Args:
            label: Its label.
            stage: The stage.
            model: Its input.
            rows: Row numbers of the sample.
            longest: The same, the longest examples first.
            encoding: Seconds of encoding an example.
        """
        # One epoch without selection of the best one, so that each example is read exactly once.
        one_epoch = {"epochs": 1.0, "keep_best": False}
        fields = type(stage).model_fields
        short = stage.model_copy(update={name: value for name, value in one_epoch.items() if name in fields})
        batch_size = getattr(stage, "batch_size", _BATCH_SIZE)
        sample = rows[: _BATCHES * batch_size]
        # The longest examples show the peak memory, a few examples the constant time, the sample the time per example.
        first, _, peak, _ = self._run(short, model, longest[:batch_size])
        constant, *_ = self._run(short, model, sample[:_FEW])
        beside, steps, _, output = self._run(short, model, sample)
        if isinstance(output, TorchModel):
            self.outputs[label] = output
        # A stage that reads unlabeled text gets as large a share of it as of the training split.
        unlabeled = self.data.unlabeled if stage.needs().unlabeled else None
        factor = 1.0 if unlabeled is None else 1.0 + len(unlabeled) / max(len(self.data.split("train")), 1)
        # Two runs of different lengths separate the constant time from the time per example.
        per_example = max(beside - constant, 0.0) / (factor * max(len(sample) - _FEW, 1))
        # The first run also imports the libraries that the stage calls.
        startup = first - factor * per_example * min(len(longest), batch_size)
        return StageTiming(
            seconds=max(startup, constant - factor * per_example * _FEW, 0.0),
            example_seconds=min(per_example, encoding) + self.clock.shared(max(per_example - encoding, 0.0)),
            step_seconds=self.clock.shared(steps) / (factor * len(sample)),
            peak_rss_bytes=peak,
            shape=shape_of(output if isinstance(output, TorchModel) else model, self.start),
        )

    def _run(self, stage: Any, model: TorchModel, rows: np.ndarray) -> tuple[float, float, int, Any]:
        """Run a stage on a copy of a model.

        Returns:
            Seconds beside and in training steps, the peak memory, and the output.
        """
        progress, model = _Steps(self.clock), copy.deepcopy(model)
        # A context with those rows of the training split, and the same share of the unlabeled rows.
        train, unlabeled = self.data.split("train"), self.data.unlabeled
        share = len(rows) / max(len(train), 1)
        few = None if unlabeled is None else unlabeled.slice(0, max(round(share * len(unlabeled)), 1))
        context = Context(
            task=self.task,
            data=replace(self.data, tables={"train": train.take(rows)}, unlabeled=few, extra={}),
            max_length=self.recipe.data.max_length,
            seed=self.recipe.seed,
            progress=progress,
            earlier=lambda label: copy.deepcopy(self.outputs[label]),
            resolve=self._resolve,
            scratch=self.scratch / "work",
        )
        began = self.clock.now()
        with metered() as meter, use_device(resolve_device(self.recipe.device)):
            output = stage.run(model, context)
        steps = progress.spent.get(stage.kind, 0.0)
        return self.clock.now() - began - steps, steps, meter.peak_rss_bytes, output


def shape_of(model: TorchModel, start: Path) -> Shape:
    """Return the shape of a model in memory; the size of its processor is that in the starting model's folder."""
    weights = weight_files(start)
    processor = sum(file.stat().st_size for file in start.rglob("*") if file.is_file() and file not in weights)
    named = ((name, tuple(tensor.shape)) for name, tensor in model.module.named_parameters())
    return count(named, model.module.config.to_dict(), processor)


def main() -> None:
    """Benchmark the recipe that standard input contains as JSON.

    Timings, or the error in its data or model, are written into files.
    """
    quiet_libraries()
    order = json.load(sys.stdin)
    scratch = Path(order["scratch"])
    try:
        benchmarker = StageBenchmarker(Recipe.model_validate(order["recipe"]), Path(order["folder"]), scratch)
    except InputError as error:
        problem = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
        (scratch / REFUSED).write_text(json.dumps(problem))
        return
    for benchmarks in benchmarker.run_all():
        (scratch / "trial.json").write_text(benchmarks.model_dump_json())


if __name__ == "__main__":
    main()
