"""What distillation gives back to SmolLM2-135M with a fifth of its weights gone, by how long it may take.

    python benchmarks/language_distillation.py FOLDER 10m 30m 60m           # a student for each, from the same cut
    python benchmarks/language_distillation.py FOLDER 10m 30m 60m --write   # puts all that FOLDER has into results/
    python benchmarks/language_distillation.py FOLDER --states 20480        # two more that share the teacher's states

The cut and the lesson are those of `recipes/smollm2-cut.yaml`; perplexity is that of its 20 test windows in torch.
What FOLDER has is not made again, so that the budgets can be taken on several days. Run nothing else beside it.
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


class _Told(SilentProgress):
    def note(self, message: str) -> None:
        """Say it at once."""
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


class Lesson:
    """The recipe's cut, made once in ``folder``, and students of it."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._stages = {stage.kind: stage for stage in read_recipe(RECIPE).stages}
        self._folder = folder
        self._setting = LanguageSetting("sample:smollm2", "sample:wiki", folder, threads, 4, 64, SilentProgress())

    @cached_property
    def cut(self) -> Path:
        """The checkpoint that every student starts from."""
        cut_folder = self._folder / "cut"
        if not cut_folder.is_dir():
            stage = self._stages["prune_decoder"]
            assert isinstance(stage, PruneDecoder)
            context = self._setting.context(self._made_in("pruning"))
            shutil.copytree(stage.run(Checkpoint(self._setting.source), context).folder, cut_folder)
        return cut_folder

    def teach(self, name: str, shared: Path | None = None, **fields: Any) -> None:
        """A student, in ``name``; what was said to it and how long it took in its ``lesson.json``."""
        stage = self._stages["distill_language_model"]
        assert isinstance(stage, DistillLanguageModel)
        given = stage.model_dump(exclude_unset=True, exclude={"budget"}) | fields
        context = replace(
            self._setting.context(self._made_in(f"{name}-work")),
            progress=_Told(),
            earlier=lambda _: self._model(self._setting.source),
        )
        if shared is not None:
            context = replace(context, shared=lambda key: shared / key)
        began = time.perf_counter()
        student = DistillLanguageModel.model_validate(given).run(self._model(self.cut), context)
        seconds, ((*_, (tokens, _)),) = time.perf_counter() - began, (table.rows for table in context.tables)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        took = {"seconds": seconds, "tokens": tokens, "peak_gb": peak}
        student.save(self._folder / name)
        (self._folder / name / "lesson.json").write_text(json.dumps(took))

    def took(self, name: str) -> dict[str, Any]:
        """Seconds, tokens and peak memory of a student's lesson."""
        record: dict[str, Any] = json.loads((self._folder / name / "lesson.json").read_text())
        return record

    def perplexity(self, name: str) -> float:
        """Of ``whole``, ``cut`` or a student, computed once."""
        record = self._folder / f"{name}.json"
        if not record.is_file():
            folder = self._setting.source if name == "whole" else self.cut if name == "cut" else self._folder / name
            record.write_text(json.dumps(self._setting.perplexity_of_checkpoint(folder)))
        return float(json.loads(record.read_text()))

    def _model(self, folder: Path) -> TorchModel:
        model: TorchModel = self._setting.task.load(folder, None, False)
        return model

    def _made_in(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def main(
    folder: Annotated[Path, typer.Argument(help="Where the cut and the students go.")],
    budgets: Annotated[list[str] | None, typer.Argument(help="How long a student may learn, e.g. 30m.")] = None,
    states: Annotated[int, typer.Option(help="Tokens of two students, the second with known states.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    write: Annotated[bool, typer.Option(help="Write what the folder has into results/.")] = False,
) -> None:
    """Teach what has not been taught, and print everything."""
    quiet_libraries()
    lesson = Lesson(folder, threads)
    for name in ("first", "second", "none") if states else ():
        lesson.teach(name, folder / "states", tokens=states, memory={"cache_teacher_states": name != "none"})
        typer.echo(f"{name}: {lesson.took(name)['seconds']:.1f} s in all")
    for budget in budgets or ():
        if not (folder / budget).is_dir():
            lesson.teach(budget, budget=budget)
    trained_budgets = sorted(
        (file.parent.name for file in folder.glob("*m/lesson.json")), key=lambda name: int(name[:-1])
    )
    rows = [[name, f"{lesson.perplexity(name):.2f}", ""] for name in ("whole", "cut")]
    for name in trained_budgets:
        took = lesson.took(name)
        rows.append([f"taught {name[:-1]} minutes", f"{lesson.perplexity(name):.2f}", f"{took['tokens']:,}"])
    for row in rows:
        typer.echo(" | ".join(row))
    if write:
        page = {
            "title": "What minutes of distillation give back",
            "order": 23,
            "command": "python benchmarks/language_distillation.py FOLDER 10m 30m 60m --write",
            "machine": f"{processor()}, {threads} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": "SmolLM2-135M, cut and taught as by `recipes/smollm2-cut.yaml`; "
            "perplexity of the 20 test windows, torch in fp32. A budget's learning rate falls to nothing at its end.",
            "tables": [{"title": "", "columns": ["", "perplexity", "tokens"], "rows": rows}],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
