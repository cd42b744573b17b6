"""Command `compress init`: from a model and data to a short recipe."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.utils.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from compress.recipe.initial_recipe import InitialModel
    from compress.tasks.task import Task

_FEW_FILES, _FEW_BYTES = 1000, 5_000_000
"""Files and bytes from which on data has enough rows for the limits of a first recipe."""
_FEWEST_STEPS, _MOST_EPOCHS = 30, 20
"""Steps of training below which epochs are added, and the most epochs for that."""


def init(
    model_argument: Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Local folder, GGUF or ONNX file, sample:NAME, or Hugging Face id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A data file, a folder with a file per split or per class, or sample:NAME.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Hugging Face name of the task; default: from the model and the columns.")
    ] = None,
    target: Annotated[str, typer.Option(help="Target of the result, as `compress targets` lists them.")] = "cpu",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=NAME", help="Name in the files of a column, e.g. label=stars; repeat it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; default: NAME.yaml.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the recipe; default: that of the output or data.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Write and explain every field.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and ask nothing.")] = False,
) -> None:
    """Write a short recipe for a model and data. On a terminal, missing values are asked for."""
    from compress.cli.output import show_hint, write_new_file
    from compress.data.column_names import column_names
    from compress.data.layout import Layout, find_layout
    from compress.formats.targets import find_target
    from compress.recipe.initial_recipe import initial_values, short_recipe
    from compress.recipe.json_schema import full_recipe
    from compress.tasks.registry import TASK_NAMES, TASKS

    asks = not json_ and sys.stdin.isatty() and sys.stdout.isatty()
    if task is not None and task not in TASK_NAMES:
        message = f"There is no task {task!r}.{did_you_mean(task, TASK_NAMES)}"
        raise InputError(message, where="--task", expected=f"one of {', '.join(TASK_NAMES)}")
    find_target(target)
    given = dict(map(_parse_column, column or ()))
    model = _one_model(model_argument, model, asks)
    folder = Path() if output is None else output.parent
    found = _find_model(model, task)
    if data is None and not (found.task and TASKS[found.task].data):
        data = _ask("--data", "Data (file, folder or sample:NAME)", _data_files(), asks)
    layout = Layout() if data is None else find_layout(data, folder)
    names = column_names(layout.example) if layout.example is not None else ()
    task_is_given = task is not None
    if task is None:
        task = _choose_task(found, names, asks)
        if not given.keys() <= {column.name for column in TASKS[task].columns}:
            # Columns that the user named tell the task.
            task = _choose_task(found, (*given, *(name for name in names if name not in given.values())), asks)
    columns = _match(TASKS[task], names, given, data or "", asks, task_is_given) if names else given
    name = name or _default_name(output.stem if output else Path(data or model).resolve().stem)
    output = output or Path(f"{name}.yaml")
    initial_model = found.of_task(task, model, folder)
    values = initial_values(name, initial_model, layout.fields, columns, target)
    notes = _convolution_notes(data) if initial_model.is_convolutional else []
    if layout.example is not None and _is_small(layout.example):
        notes += _fit_to_rows(values, TASKS[task], folder)
    notes += _unused_columns(TASKS[task], [name for name in names if name not in columns.values()])
    text = full_recipe(values) if full else short_recipe(values)
    write_new_file(output, text, force)
    commands = [f"compress check {output}", f"compress run {output}"]
    if json_:
        typer.echo(
            json.dumps({"file": str(output), "task": task, "columns": columns, "recipe": text, "next": commands})
        )
        return
    renamed = ", ".join(f"{other} is {own}" for own, other in columns.items() if own != other)
    typer.echo(f"{output}: {task}" + (f" ({renamed})" if renamed else ""))
    for note in notes:
        show_hint(note)
    typer.echo("\n".join(["Next:", *(f"  {command}" for command in commands)]))


def _one_model(argument: str | None, option: str | None, asks: bool) -> str:
    """Return the model of the command line, or ask for it. Raises `InputError` for two different ones."""
    if argument is not None and option not in (None, argument):
        raise InputError(f"Two models are named: {argument} and {option}.", where="--model", expected="one model")
    question = "Model (folder, GGUF or ONNX file, sample:NAME, Hugging Face id)"
    return argument or option or _ask("--model", question, _models(), asks)


def _convolution_notes(data: str | None) -> list[str]:
    """Return notes on a graph of convolutions."""
    notes = ["onnx_int8: method static, because dynamic quantization leaves convolutions in float"]
    if data is None:
        notes.append("its ranges will come from random inputs; --data names a folder with real ones, as .npz files")
    return notes


def _unused_columns(task: Task, unused: Sequence[str]) -> list[str]:
    """Return a note on columns that the task does not read, which may be what the user is after."""
    if not unused:
        return []
    note = f"{task.name} does not read the columns {', '.join(unused)}"
    if task.name != "text-classification" and any(column.name == "text" for column in task.columns):
        note += f"; for a label: --task text-classification --column label={unused[0]}"
    return [note]


def _is_small(path: Path) -> bool:
    """Return whether a data file or class folder may have so few rows that limits depend on their number."""
    files = list(islice(path.rglob("*"), _FEW_FILES)) if path.is_dir() else [path]
    return len(files) < _FEW_FILES and sum(file.stat().st_size for file in files) < _FEW_BYTES


def _fit_to_rows(values: dict[str, Any], task: Task, recipe_folder: Path) -> list[str]:
    """Raise epochs that so few training rows make too short, and lower limits that so few test rows cannot decide.

    Returns a note on each change.
    """
    from compress.data.config import DataConfig
    from compress.data.dataset import TEST, load_dataset
    from compress.recipe.limit_checks import changed_rows_share, decidable_bound, is_share_of_rows
    from compress.stages.registry import STAGES
    from compress.utils.errors import DataError
    from compress.utils.progress import SilentProgress

    config = DataConfig.model_validate(values["data"])
    try:
        data = load_dataset(config, task.columns, recipe_folder, SilentProgress(), fetch=False)
    except DataError:
        # `compress check` reports the problems of the data.
        return []
    notes = _more_epochs(values["stages"], len(data.tables.get("train", ())))
    kinds = [next(iter(stage)) for stage in values["stages"]]
    # The baseline is a stage of a starter, or the starting model.
    baseline = values.get("baseline")
    changed = changed_rows_share(
        [STAGES[kind] for kind in kinds[kinds.index(baseline) + 1 if baseline in kinds else 0 :]]
    )
    for limit in values["limits"]:
        if TEST in data.tables and "at_least" in limit and is_share_of_rows(limit["metric"]):
            rows = len(data.tables[TEST])
            bound = decidable_bound(rows, changed)
            if bound < limit["at_least"]:
                limit["at_least"] = bound
                notes.append(
                    f"{limit['metric']} at least {bound:g}: {rows:,} test rows can hardly decide a higher limit"
                )
    return notes


def _more_epochs(stages: Iterable[dict[str, Any]], rows: int) -> list[str]:
    """Raise the epochs of stages with too few steps for any learning, and return a note on each change."""
    notes = []
    for stage in stages:
        ((kind, fields),) = stage.items()
        if rows and {"epochs", "batch_size"} <= fields.keys():
            steps = math.ceil(rows / fields["batch_size"])
            epochs = min(math.ceil(_FEWEST_STEPS / steps), _MOST_EPOCHS)
            if epochs > fields["epochs"]:
                fields["epochs"] = epochs
                notes.append(f"{kind}: {epochs} epochs, because {rows:,} training rows are {steps} steps an epoch")
    return notes


@dataclass(frozen=True)
class _FoundModel:
    """A model that the user names: its path, None if it must be fetched first, and the task of its config."""

    path: Path | None
    task: str | None
    reason: str

    def of_task(self, task: str, reference: str, recipe_folder: Path) -> InitialModel:
        """Return the model with its sizes, as a recipe for ``task`` in a folder names it."""
        from compress.data.layout import relative_to_recipe
        from compress.pipeline.recipe_sources import read_shape
        from compress.recipe.initial_recipe import InitialModel
        from compress.sources.resolve import is_graph, local_task_variants
        from compress.tasks.registry import TASKS

        kind = local_task_variants(TASKS[task], reference, Path())[0]
        shape = None if self.path is None else read_shape(self.path)
        local = Path(reference).expanduser()
        written = relative_to_recipe(local, recipe_folder) if local.exists() else reference
        is_onnx = is_graph(reference, Path())
        return InitialModel(written, kind, shape, is_onnx, is_onnx and self.path is not None and _convolves(self.path))


def _convolves(path: Path) -> bool:
    """Return whether convolutions have most of the weights of an ONNX graph."""
    from compress.formats.onnx.graph_reader import convolution_share, read_graph
    from compress.sources.onnx_file import onnx_file

    graph = onnx_file(path)
    return graph is not None and convolution_share(read_graph(graph)) > 0.5


def _find_model(reference: str, task: str | None) -> _FoundModel:
    """Return a model without downloading it.

    Raises `ModelError` or `InputError` if it is not on this machine, unless the user gives the task.
    """
    from compress.data.samples.sample import find_sample
    from compress.recipe.loading import infer_task_of_reference
    from compress.sources.resolve import find_model, local_model_path
    from compress.utils.errors import ModelError

    path = local_model_path(reference, Path())
    if path is None and reference.startswith("sample:"):
        sample = find_sample(reference)
        if task is None:
            fetch = f"run `compress samples fetch {sample.name}`, or name the task with --task"
            raise InputError(f"{reference} is not on this machine yet.", where="--model", hint=fetch)
    elif path is None:
        try:
            path = find_model(reference)
        except ModelError as error:
            # Without a path and a cached copy it may still be an id on the Hub.
            is_id = error.hint is not None and "hf download" in error.hint
            if not is_id or task is None:
                hint = f"run `hf download {reference}`, or name the task with --task" if is_id else error.hint
                raise ModelError(error.what, where="--model", expected=error.expected, hint=hint) from error
    if path is None:
        return _FoundModel(None, task, "")
    # The header of a GGUF file tells its task before the file is converted.
    if gguf_task := _gguf_task(path):
        return _FoundModel(path, task or gguf_task, "")
    own, reason = infer_task_of_reference(reference, Path())
    return _FoundModel(path, task or own, reason)


def _gguf_task(path: Path) -> str | None:
    """Return the task of a GGUF file, or of a folder with one and no config; None for other models."""
    from compress.formats.gguf.model import read_gguf
    from compress.tasks.capability import GENERATES, REWRITES
    from compress.tasks.registry import tasks_with

    folder_files = sorted(path.glob("*.gguf")) if not (path / "config.json").is_file() else []
    file = next(iter(folder_files), path)
    if file.suffix.lower() != ".gguf":
        return None
    architecture = str(read_gguf(file).metadata.get("general.architecture"))
    return tasks_with(frozenset({REWRITES if "t5" in architecture else GENERATES}))[0]


def _choose_task(model: _FoundModel, names: Sequence[str], asks: bool) -> str:
    """Return the task of the model and the columns, or the user's answer. Raises `InputError` if nothing tells."""
    from compress.recipe.initial_recipe import choose_task, tasks_for_columns
    from compress.tasks.registry import TASK_NAMES

    task = choose_task(model.task, names)
    if task is None and asks:
        return _ask_one_of("Task", TASK_NAMES, next(iter(tasks_for_columns(names)), None))
    if task is None:
        raise InputError(
            f"Neither the model nor the columns {', '.join(names) or '(unknown)'} tell the task: {model.reason}.",
            where="--task",
            expected=f"one of {', '.join(TASK_NAMES)}",
        )
    return task


def _match(
    task: Task, names: Sequence[str], given: Mapping[str, str], data: str, asks: bool, task_is_given: bool
) -> dict[str, str]:
    """Return the name in the data for each column of the task. Raises `InputError` for one without a match."""
    from compress.data.column_names import match_columns
    from compress.data.columns import check_mapping
    from compress.recipe.initial_recipe import tasks_for_columns

    check_mapping(given, task.columns)
    if unknown := [name for name in given.values() if name not in names]:
        message = f"{data} has no column {unknown[0]!r}.{did_you_mean(unknown[0], names)}"
        raise InputError(message, where="--column", expected=f"one of {', '.join(names)}")
    matches, missing = match_columns(task.columns, names, given)
    if missing and not asks:
        others = [f"--task {name}" for name in tasks_for_columns(names) if name != task.name]
        classes = "text-classification"
        if not others and task.name != classes and any(column.name == "text" for column in task.columns):
            text, label = names if len(names) == 2 else ("NAME", "NAME")
            others = [f"--task {classes} --column text={text} --column label={label}"]
        only = len(names) == len(missing)
        options = " ".join(
            f"--column {name}={found if only else 'NAME'}"
            for name, found in zip(missing, names if only else missing, strict=True)
        )
        if not task_is_given and others:
            raise InputError(
                f"The columns of {data} do not tell the task: {', '.join(names)}.",
                where="--column",
                expected=f"{options} for {task.name}, the model's task",
                hint=f"for another task: {' or '.join(others)}",
            )
        raise InputError(
            f"{data} has no column for {' and '.join(missing)}, which {task.name} reads.",
            where="--column",
            expected=f"{options}, with one of its columns: {', '.join(names)}",
            hint=f"or another task: {' or '.join(others)}" if others else None,
        )
    guessed = {column: name for column, name in matches.items() if name not in (column, given.get(column))}
    proposal = " and ".join(f"{name!r} as {column}" for column, name in guessed.items())
    if asks and (missing or (guessed and not typer.confirm(f"Read {proposal}?", default=True))):
        for column in (*missing, *guessed):
            matches[column] = _ask_one_of(f"Column of {data} for {column}", names, matches.get(column))
    return matches


def _parse_column(option: str) -> tuple[str, str]:
    column, equals, name = option.partition("=")
    if not (column and equals and name):
        raise InputError(f"{option!r} names no column.", where="--column", expected="COLUMN=NAME, e.g. label=stars")
    return column, name


def _ask(flag: str, question: str, candidates: Iterable[str], asks: bool) -> str:
    """Return the user's answer; without a terminal raise `InputError` for the missing value of ``flag``."""
    if not asks:
        raise InputError(
            f"{flag} is missing.",
            where=flag,
            expected=question,
            hint="give --model and --data, or run it on a terminal, where it asks",
        )
    answer: str = typer.prompt(question, default=next(iter(candidates), None))
    return answer


def _ask_one_of(question: str, choices: Sequence[str], default: str | None) -> str:
    """Return the user's choice, after asking again for anything else."""
    while (answer := typer.prompt(f"{question} ({', '.join(choices)})", default=default)) not in choices:
        typer.echo(f"{answer!r} is not one of them.{did_you_mean(answer, choices)}", err=True)
    return str(answer)


def _models() -> list[str]:
    """Return the models in the current folder."""
    return [
        path.name
        for path in sorted(Path().iterdir())
        if path.suffix.lower() in (".gguf", ".onnx") or (path / "config.json").is_file()
    ]


def _data_files() -> list[str]:
    """Return the data files in the current folder."""
    from compress.data.config import is_file_name

    return [path.name for path in sorted(Path().iterdir()) if path.is_file() and is_file_name(path.name)]


def _default_name(text: str) -> str:
    """Return a valid recipe name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "recipe"
