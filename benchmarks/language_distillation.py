"""Measure the perplexity of a pruned SmolLM2-135M after distillation, for several time budgets.

    python benchmarks/language_distillation.py FOLDER 10m 30m 60m           # one student per budget
    python benchmarks/language_distillation.py FOLDER 10m 30m 60m --write   # also writes the results of FOLDER
    python benchmarks/language_distillation.py FOLDER --states 20480        # students with cached teacher states

Pruning and training are those of `recipes/smollm2-cut.yaml`. Perplexity is that of 20 test windows in torch. Models
that FOLDER already has are not trained again, so that budgets can be measured on several days. The machine must be
otherwise idle.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers.language_setting import LanguageSetting

from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.recipe.loading import read_recipe
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.prune_decoder.stage import PruneDecoder
from compress.utils.environment import processor
from compress.utils.progress import SilentProgress

RECIPE = Path("recipes/smollm2-cut.yaml")
RESULTS = Path(__file__).parent / "results" / "language-distillation.json"


class _PrintedNotes(SilentProgress):
    def note(self, message: str) -> None:
        """Print the message immediately."""
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


class Distillation:
    """The recipe's pruned model and students trained from it, stored in ``folder``."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._stages = {stage.kind: stage for stage in read_recipe(RECIPE).stages}
        self._folder = folder
        self._setting = LanguageSetting("sample:smollm2", "sample:wiki", folder, threads, 4, 64, SilentProgress())

    @cached_property
    def pruned(self) -> Path:
        """The pruned checkpoint that every student starts from."""
        folder = self._folder / "cut"
        if not folder.is_dir():
            stage = self._stages["prune_decoder"]
            assert isinstance(stage, PruneDecoder)
            context = self._setting.context(self._create_folder("pruning"))
            shutil.copytree(stage.run(Checkpoint(self._setting.source), context).folder, folder)
        return folder

    def train(self, name: str, shared: Path | None = None, **fields: Any) -> None:
        """Train a student into the folder ``name``, with its time, tokens and memory in ``lesson.json``."""
        stage = self._stages["distill_language_model"]
        assert isinstance(stage, DistillLanguageModel)
        settings = stage.model_dump(exclude_unset=True, exclude={"budget"}) | fields
        context = replace(
            self._setting.context(self._create_folder(f"{name}-work")),
            progress=_PrintedNotes(),
            earlier=lambda _: self._model(self._setting.source),
        )
        if shared is not None:
            context = replace(context, shared=lambda key: shared / key)
        began = time.perf_counter()
        student = DistillLanguageModel.model_validate(settings).run(self._model(self.pruned), context)
        seconds, ((*_, (tokens, _)),) = time.perf_counter() - began, (table.rows for table in context.tables)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        student.save(self._folder / name)
        record = {"seconds": seconds, "tokens": tokens, "peak_gb": peak}
        (self._folder / name / "lesson.json").write_text(json.dumps(record))

    def record(self, name: str) -> dict[str, Any]:
        """Return seconds, tokens and peak memory of the training of a student."""
        record: dict[str, Any] = json.loads((self._folder / name / "lesson.json").read_text())
        return record

    def perplexity(self, name: str) -> float:
        """Return the perplexity of ``whole``, ``cut`` or a student, computed once."""
        record = self._folder / f"{name}.json"
        if not record.is_file():
            folder = self._setting.source if name == "whole" else self.pruned if name == "cut" else self._folder / name
            record.write_text(json.dumps(self._setting.perplexity_of_checkpoint(folder)))
        return float(json.loads(record.read_text()))

    def _model(self, folder: Path) -> TorchModel:
        model: TorchModel = self._setting.task.load(folder, None, False)
        return model

    def _create_folder(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the pruned model and the students.")],
    budgets: Annotated[list[str] | None, typer.Argument(help="Training times, e.g. 30m; one student each.")] = None,
    states: Annotated[
        int, typer.Option(help="Train students on this many tokens with and without cached teacher states.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    write: Annotated[bool, typer.Option(help="Write the results of the folder into benchmarks/results.")] = False,
) -> None:
    """Train the missing students, and print all results."""
    quiet_libraries()
    distillation = Distillation(folder, threads)
    for name in ("first", "second", "none") if states else ():
        distillation.train(name, folder / "states", tokens=states, memory={"cache_teacher_states": name != "none"})
        typer.echo(f"{name}: {distillation.record(name)['seconds']:.1f} s in total")
    for budget in budgets or ():
        if not (folder / budget).is_dir():
            distillation.train(budget, budget=budget)
    trained_budgets = sorted(
        (file.parent.name for file in folder.glob("*m/lesson.json")), key=lambda name: int(name[:-1])
    )
    names = {"whole": "original", "cut": "pruned"}
    rows = [[label, f"{distillation.perplexity(name):.2f}", ""] for name, label in names.items()]
    for name in trained_budgets:
        tokens = distillation.record(name)["tokens"]
        rows.append([f"{name[:-1]} minutes", f"{distillation.perplexity(name):.2f}", f"{tokens:,}"])
    for row in rows:
        typer.echo(" | ".join(row))
    if write:
        page = {
            "title": "Distillation by time budget",
            "order": 23,
            "command": "python benchmarks/language_distillation.py FOLDER 10m 30m 60m --write",
            "machine": f"{processor()}, {threads} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": "SmolLM2-135M, pruned and distilled as in `recipes/smollm2-cut.yaml`; "
            "perplexity of the 20 test sequences, torch in fp32. The learning rate decays to 0 within the budget.",
            "tables": [
                {
                    "title": "Perplexity by minutes of distillation",
                    "columns": ["model", "perplexity", "training tokens"],
                    "rows": rows,
                }
            ],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
