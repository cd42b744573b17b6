"""The process in which a recipe's training stages are tried: `python -m compress.pipeline.stage_benchmark_process`."""

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
from compress.formats.silence import quiet_libraries
from compress.models.folder_checks import weight_files
from compress.models.json_file import read_json
from compress.models.torch_model import TorchModel
from compress.pipeline.checkpoint_headers import count
from compress.pipeline.run_inputs import resolve_recipe_model
from compress.pipeline.stage_benchmark import REFUSED, StageBenchmarks, StageTiming
from compress.recipe.recipe import START, Recipe
from compress.stages.base import Context, Stage
from compress.stages.cost_model import Shape
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
"""Examples of the pass that tells what a stage takes whatever it is given."""
_BATCHES, _SAMPLE_BATCHES = 2, 4
"""Batches that a stage learns from, and those from which the longest examples are taken."""
_BUSY, _EFFICIENCY = 0.05, 0.93
_COUNTED, _ANSWERED = 4, 64


class Clock:
    """Seconds that computing takes here, by all of its threads.

    Where others keep the machine busy, threads wait for each other; then one thread computes, its processor's seconds
    count, and as many threads as there would be are taken to do `_EFFICIENCY` of their number's work.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.busy = _share_waited() > _BUSY
        if self.busy:
            torch.set_num_threads(1)

    def now(self) -> float:
        """The time now, of no known beginning; one thread's where others keep the machine busy."""
        return time.process_time() if self.busy else time.perf_counter()

    def shared(self, seconds: float) -> float:
        """What all threads need for what took ``seconds`` by this clock."""
        return seconds / max(_EFFICIENCY * self.threads, 1.0) if self.busy else seconds


def _share_waited() -> float:
    """The share of its life so far that this thread was ready to run while others ran, where Linux counts it."""
    try:
        ran, waited = map(int, Path("/proc/thread-self/schedstat").read_text().split()[:2])
    except (OSError, ValueError):
        return 0.0
    return waited / max(ran + waited, 1)


@dataclass
class _Steps(SilentProgress):
    """Counts the seconds of what is tracked, by its description."""

    clock: Clock
    spent: dict[str, float] = field(default_factory=dict)

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``."""
        began = self.clock.now()
        yield from items
        self.spent[description] = self.spent.get(description, 0.0) + self.clock.now() - began


@dataclass
class Rehearsal:
    """One recipe whose stages are tried one after the other; all of its files are here."""

    recipe: Recipe
    folder: Path
    scratch: Path

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.clock = Clock()
        began = self.clock.now()
        self.start = self._resolve(recipe.model)
        self.task: Task = get_task(recipe.task)
        if len(self.task.kinds()) > 1:
            self.task = self.task.of(read_json(self.start / "config.json"))
        self.data = load_dataset(recipe.data, self.task.columns, self.folder, SilentProgress())
        torch.manual_seed(recipe.seed)
        model = self.task.load(self.start, self.data.labels, recipe.trust_remote_code)
        self.outputs: dict[str, TorchModel] = {START: model}
        self.ready_seconds = self.clock.now() - began

    def _resolve(self, reference: str) -> Path:
        return resolve_recipe_model(reference, self.recipe, self.folder, self.scratch / "models", SilentProgress())

    def try_all(self) -> Iterator[StageBenchmarks]:
        """What is known so far, after the model was looked at and after each stage that was tried."""
        with metered() as meter:
            pass
        model, before = self.outputs[START], START
        batch = max(getattr(stage, "batch_size", 1) for stage in self.recipe.stages)
        table = self.data.split("train")
        rows = np.random.default_rng(0).permutation(len(table))[: _SAMPLE_BATCHES * batch]
        began = self.clock.now()
        examples = self._encode(model, rows)
        encoding = (self.clock.now() - began) / len(rows)
        found = StageBenchmarks(
            start=shape_of(model, self.start),
            uses=self._uses(model, examples),
            answer_seconds=self._answer_seconds(model, examples),
            encode_seconds=encoding,
            example_bytes=_bytes_of(examples),
            ready_seconds=self.ready_seconds,
            ready_bytes=meter.peak_rss_bytes,
        )
        yield found
        lengths = examples.lengths() if len(examples) == len(rows) else np.zeros(len(rows))
        longest = rows[np.argsort(-lengths, kind="stable")]
        for label, stage in zip(self.recipe.labels(), self.recipe.stages, strict=True):
            if isinstance(stage, Training):
                tried = self._try(label, stage, self.outputs[before], rows, longest, encoding)
                found = found.model_copy(update={"stages": {**found.stages, label: tried}})
                yield found
                if label not in self.outputs:
                    return
                before = label
            elif stage.wants(self.task.capabilities) is TorchModel and stage.output_type() is TorchModel:
                # What the others do goes by all rows, or is little: what follows is tried with what they get.
                self.outputs[label] = self.outputs[before]
                if stage.decides_shape_by_data:
                    tried = self._run_whole(label, stage, self.outputs[before])
                    found = found.model_copy(update={"stages": {**found.stages, label: tried}})
                    yield found
                before = label
            else:
                return

    def _encode(self, model: TorchModel, rows: np.ndarray) -> Examples:
        table = self.data.split("train").take(rows)
        return self.task.encode(table, model.processor, model.labels(), self.recipe.data.max_length)

    def _uses(self, model: TorchModel, examples: Examples) -> float:
        few = list(range(min(_COUNTED, len(examples))))
        batch = tensors(examples, few)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.module.eval()(**{name: batch[name] for name in examples.padding})
        working = shape_of(model, self.start).working
        return float(counter.get_total_flops()) / (2 * max(working, 1.0) * len(few))

    def _answer_seconds(self, model: TorchModel, examples: Examples) -> float:
        few = examples.subset(range(min(_ANSWERED, len(examples))))
        predict(model.module, few)
        began = self.clock.now()
        predict(model.module, few)
        seconds: float = self.clock.shared(self.clock.now() - began)
        return seconds / len(few)

    def _try(
        self, label: str, stage: Any, model: TorchModel, rows: np.ndarray, longest: np.ndarray, encoding: float
    ) -> StageTiming:
        """With the longest examples for memory, with next to none, and with a few batches."""
        one = stage.model_copy(update={"epochs": 1.0, "keep_best": False})
        some = rows[: _BATCHES * stage.batch_size]
        first, _, peak, _ = self._pass(one, model, longest[: stage.batch_size])
        constant, *_ = self._pass(one, model, some[:_FEW])
        beside, steps, _, output = self._pass(one, model, some)
        if isinstance(output, TorchModel):
            self.outputs[label] = output
        # With those of the training split goes as large a part of the unlabeled text, for who reads it.
        unlabeled = self.data.unlabeled if stage.needs().unlabeled else None
        more = 1.0 if unlabeled is None else 1.0 + len(unlabeled) / max(len(self.data.split("train")), 1)
        each = max(beside - constant, 0.0) / (more * max(len(some) - _FEW, 1))
        # The first pass imports what the stage calls.
        beginning = first - more * each * min(len(longest), stage.batch_size)
        return StageTiming(
            seconds=max(beginning, constant - more * each * _FEW, 0.0),
            example_seconds=min(each, encoding) + self.clock.shared(max(each - encoding, 0.0)),
            step_seconds=self.clock.shared(steps) / (more * len(some)),
            peak_rss_bytes=peak,
            shape=shape_of(output if isinstance(output, TorchModel) else model, self.start),
        )

    def _run_whole(self, label: str, stage: Stage[Any, Any], model: TorchModel) -> StageTiming:
        """On all rows."""
        rows = np.arange(len(self.data.split("train")))
        seconds, _, peak, self.outputs[label] = self._pass(stage, model, rows)
        shape = shape_of(self.outputs[label], self.start)
        return StageTiming(seconds=seconds, example_seconds=0.0, step_seconds=0.0, peak_rss_bytes=peak, shape=shape)

    def _pass(self, stage: Any, model: TorchModel, rows: np.ndarray) -> tuple[float, float, int, Any]:
        """Seconds beside the steps of training and in them, the peak of memory, and the output."""
        progress, given = _Steps(self.clock), copy.deepcopy(model)
        context, began = self._context(rows, progress), self.clock.now()
        with metered() as meter, use_device(resolve_device(self.recipe.device)):
            output = stage.run(given, context)
        steps = progress.spent.get(stage.kind, 0.0)
        return self.clock.now() - began - steps, steps, meter.peak_rss_bytes, output

    def _context(self, rows: np.ndarray, progress: _Steps) -> Context:
        """What a stage is given: those rows of the training split, as many times as it has unlabeled ones too."""
        data = self.data
        share = len(rows) / max(len(data.split("train")), 1)
        unlabeled = data.unlabeled
        few = None if unlabeled is None else unlabeled.slice(0, max(round(share * len(unlabeled)), 1))
        tables = {"train": data.split("train").take(rows)}
        return Context(
            task=self.task,
            data=replace(data, tables=tables, unlabeled=few, extra={}),
            max_length=self.recipe.data.max_length,
            seed=self.recipe.seed,
            progress=progress,
            earlier=lambda label: copy.deepcopy(self.outputs[label]),
            resolve=self._resolve,
            scratch=self.scratch / "work",
        )


def shape_of(model: TorchModel, start: Path) -> Shape:
    """The shape of a model in memory, with the processor's files as they lie in the starting model's folder."""
    weights = weight_files(start)
    processor = sum(file.stat().st_size for file in start.rglob("*") if file.is_file() and file not in weights)
    named = ((name, tuple(tensor.shape)) for name, tensor in model.module.named_parameters())
    return count(named, model.module.config.to_dict(), processor)


def _bytes_of(examples: Examples) -> float:
    few = [examples.inputs[place] for place in range(min(len(examples), _ANSWERED))]
    return sum(array.nbytes for one in few for array in one.values()) / max(len(few), 1)


def main() -> None:
    """Try the recipe that standard input holds; what is found is written below its ``scratch`` folder.

    So is what is wrong with the data or the model, where they can't be read as the recipe has it.
    """
    quiet_libraries()
    order = json.load(sys.stdin)
    scratch = Path(order["scratch"])
    try:
        rehearsal = Rehearsal(Recipe.model_validate(order["recipe"]), Path(order["folder"]), scratch)
    except InputError as error:
        told = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
        (scratch / REFUSED).write_text(json.dumps(told))
        return
    for found in rehearsal.try_all():
        (scratch / "trial.json").write_text(found.model_dump_json())


if __name__ == "__main__":
    main()
