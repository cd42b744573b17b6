"""Options of `compress search` as a recipe with a `search:` block."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compress.data.config import is_file_name, is_sample
from compress.data.dataset import label_column
from compress.data.source import find, read
from compress.formats.quiet_output import quiet_libraries
from compress.formats.registry import FORMATS
from compress.formats.targets import TARGETS
from compress.models.json_file import read_json
from compress.pipeline.recipe_sources import read_shape
from compress.plugins.search.default_space import add_default_space, initial_stages, is_possible
from compress.plugins.search.space import StageFields
from compress.recipe.document import Document, read_document
from compress.recipe.loading import infer_task_of_document
from compress.recipe.overrides import apply_override
from compress.results.formatting import parse_duration
from compress.sources.resolve import resolve_model
from compress.stages.registry import STAGES
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASK_NAMES, TASKS
from compress.tasks.task import Task
from compress.utils.errors import InputError, did_you_mean

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]")
_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)")
_IN_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_SPLITS = ("train", "validation", "test")
_SHARES = {"test": (0.2, 2000), "validation": (0.05, 500), "select": (0.2, 1500)}
"""For data in a single file: share of the rows that is held out for each split, and the largest number."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of the command."""

    model: str | None = None
    data: str | None = None
    task: str | None = None
    keep: float | None = None
    max_size: str | None = None
    max_latency: str | None = None
    minimize: tuple[str, ...] = ()
    target: str = "cpu"
    budget: str | None = None
    trials: int | None = None


def build_document(
    recipe: Path | None, options: SearchOptions, overrides: Sequence[str] = ()
) -> tuple[Document, Path, str]:
    """Return the recipe to search, the folder that its paths are relative to, and a description of its source.

    This is the given recipe with the options in place of its fields; or, for a model and data, the task's
    starter with the fields that its stages declare worth searching. Raises `InputError`, `RecipeError`.
    """
    if (recipe is None) == (options.model is None):
        raise InputError(
            "There is neither a recipe nor a model." if recipe is None else "There are both a recipe and a model.",
            expected="a recipe with a `search:` block, or --model with --data",
            hint="compress search RECIPE, or compress search --model M --data D --keep 0.985",
        )
    if recipe is not None:
        document, folder, origin = read_document(recipe), recipe.parent, str(recipe)
    else:
        quiet_libraries()
        document, origin = _starter_document(options)
        folder = Path()
    # Overrides come before the options, which are more specific.
    for override in overrides:
        apply_override(document, override)
    _put_limits(document, options)
    block = document.values.setdefault("search", {}) if recipe is None else document.values.get("search")
    if isinstance(block, dict):
        block |= {name: value for name, value in _block(options).items() if value is not None}
    if recipe is None:
        add_default_space(document, folder, _SHARES["select"])
    return document, folder, origin


def _starter_document(options: SearchOptions) -> tuple[Document, str]:
    """Return the starter of the task for the model and the data, and a description."""
    if options.task is not None and options.task not in TASK_NAMES:
        raise InputError(
            f"There is no task {options.task!r}.{did_you_mean(options.task, TASK_NAMES)}",
            expected=f"one of {', '.join(TASK_NAMES)}",
        )
    needs_no_data = (options.model or "").endswith(".onnx") or (options.task is not None and TASKS[options.task].data)
    if options.data is None and not needs_no_data:
        raise InputError("--model needs --data, which the model is trained on and judged by.", expected="--data D")
    task = options.task or _infer_task(options.model or "")
    values = deepcopy(dict(TASKS[task].starter))
    values["stages"], more = _stages(TASKS[task], options.model or "", values["stages"], options.target)
    # An added training stage produces the baseline that limits refer to.
    if more and "finetune" in more[0]:
        values["baseline"] = "finetune"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", (options.model or "").removeprefix("sample:").rstrip("/").split("/")[-1])
    values |= {
        "name": f"{name.strip('-.') or 'model'}-search",
        "description": f"result of `compress search` for {options.model}",
        "task": task,
        "model": options.model,
        "data": _data(options.data, values.get("data", {})),
        "targets": [options.target],
    }
    document = Document("the options given")
    document.values = values
    source = f"the starter of {task} (compress recipes new --task {task})"
    kinds = [next(iter(stage)) for stage in more]
    source += f", with {' and '.join(kinds)}" if kinds else ""
    return document, source + (_hint_at_labels(task, options.data) if options.task is None else "")


def _stages(
    task: Task, model: str, starter: Sequence[StageFields], target: str
) -> tuple[list[StageFields], list[StageFields]]:
    """Return the initial stages for the model and target, and those of them that the starter lacks."""
    if TAKES_ARRAYS in task.capabilities:
        return [dict(stage) for stage in starter], []
    folder = resolve_model(model)
    kind = task.specialize(read_json(folder / "config.json"))
    # Start from the stages of the target's format, unless they do not apply to the task.
    searched = FORMATS[TARGETS[target].format].searched if target in TARGETS else ()
    first_stages: Sequence[StageFields] = [dict(stage) for stage in searched]
    if not first_stages or not all(STAGES[next(iter(s))].supports(kind.capabilities) for s in first_stages):
        first_stages = starter
    stages = initial_stages(kind, first_stages, read_shape(folder), partial(is_possible, folder))
    starter_kinds = [next(iter(stage)) for stage in starter]
    return stages, [stage for stage in stages if next(iter(stage)) not in starter_kinds]


def _infer_task(model: str) -> str:
    document = Document("--model")
    document.values = {"model": model}
    if not infer_task_of_document(document, Path()):
        # The task of a model that has to be downloaded or converted is known only afterwards.
        resolve_model(model)
        infer_task_of_document(document, Path())
    task = document.values.get("task")
    if task is None or not TASKS[task].starter:
        raise InputError(
            f"The config of the model {model!r} names no task.",
            expected=f"--task, one of {', '.join(name for name in TASK_NAMES if TASKS[name].starter)}",
        )
    return str(task)


def _hint_at_labels(task: str, data: str | None) -> str:
    """Return a hint at the first task that would learn from a column of labels, where the inferred task has none."""
    if data is None or label_column(TASKS[task].columns) is not None:
        return ""
    # Read the column names of local training rows.
    path = None if is_sample(data) else find(data, Path())
    if path is not None and path.is_dir():
        files = (file for file in sorted(path.iterdir()) if is_file_name(file.name))
        path = next((file for file in files if file.stem == "train"), None)
    names = set(read(path, set()).names) if path is not None and path.is_file() else set()
    for other in TASK_NAMES:
        label = label_column(TASKS[other].columns)
        if label is not None and names.issuperset(column.name for column in TASKS[other].columns if column.given):
            return f"; the rows have a column {label.name!r}, which --task {other} would train on"
    return ""


def _data(reference: str | None, starter: Mapping[str, object]) -> dict[str, object]:
    """Return the data block: the source of rows, and the starter's maximum number of tokens.

    A graph without data gets random inputs, a fifth of them for selection.
    """
    if reference is None:
        splits = {"train": "random:320", "test": "random:128"}
        return {"splits": splits, "hold_out": [_hold_out("select", 64)]}
    lengths = {name: value for name, value in starter.items() if name == "max_length"}
    return {**_source(reference, starter), **lengths}


def _source(reference: str, starter: Mapping[str, Any]) -> dict[str, object]:
    """Return the source of rows. A single file is split into training, validation, test and selection rows."""
    columns = {name: value for name, value in (starter.get("columns") or {}).items() if name != value}
    if is_sample(reference) or not (is_file_name(reference) or find(reference, Path())):
        return {"source": reference, "hold_out": [_hold_out("select", 1500)]}
    path = find(reference, Path())
    if path is None:
        raise InputError(f"{reference} does not exist.", where="--data", expected="a file or a folder")
    if path.is_file():
        # Read the names first, so that only one column is loaded for counting.
        names = read(path, set()).names
        rows = read(path, names[:1])
        count = len(next(iter(rows.columns.values()), ()))
        sizes = {split: min(int(share * count), most) for split, (share, most) in _SHARES.items()}
        if min(sizes.values()) < 2:
            raise InputError(
                f"{reference} has {count} rows, too few for training, selection and test.",
                where="--data",
                expected="some hundred rows, or a folder with one file a split",
            )
        return {
            "splits": {"train": str(path.resolve())},
            "hold_out": [_hold_out(split, rows) for split, rows in sizes.items()],
            **_columns(columns, names),
        }
    entries = [entry for entry in sorted(path.iterdir()) if entry.is_dir() or is_file_name(entry.name)]
    splits = {entry.stem: entry.name for entry in entries if entry.stem in _SPLITS}
    if "train" not in splits or "test" not in splits:
        raise InputError(
            f"{reference} has no {'train' if 'train' not in splits else 'test'}.",
            where="--data",
            expected="a file or folder for each of train, test and, if you have it, validation",
        )
    train = path / splits["train"]
    more = _columns(columns, read(train, set()).names if train.is_file() else ())
    return {"source": str(path.resolve()), "splits": splits, "hold_out": [_hold_out("select", 1500)], **more}


def _columns(starter: Mapping[str, str], names: Collection[str]) -> dict[str, object]:
    """Return the starter's column names that the rows have; other columns have the task's own names."""
    columns = {name: value for name, value in starter.items() if value in names}
    return {"columns": columns} if columns else {}


def _hold_out(split: str, rows: int) -> dict[str, object]:
    return {"rows": rows, "from": "train", "split": split}


def _put_limits(document: Document, options: SearchOptions) -> None:
    """Replace limits of the recipe by the limits given as options."""
    limits = list(document.values.get("limits") or [])
    quality = next((limit for limit in limits if isinstance(limit, dict) and limit.get("of")), None)
    if quality is None and options.model is None:
        quality = {"metric": "accuracy"}
    new_limits: list[dict[str, object]] = []
    if options.keep is not None:
        if not 0 < options.keep <= 1.5:
            raise InputError(f"{options.keep:g} is not a share of a quality.", where="--keep", expected="e.g. 0.985")
        if quality is None:
            bounds = ", ".join(f"{limit['metric']} {limit.get('at_most', limit.get('at_least'))}" for limit in limits)
            raise InputError(
                "This task has no quality to keep a share of: a graph is compared with itself.",
                where="--keep",
                expected=f"another bound, of {bounds}",
                hint="e.g. --set limits.0.at_most=0.05",
            )
        # Keeping a share of a metric that is better the smaller it is, such as an error, means the inverse bound.
        bound = {"at_most": 1 / options.keep} if "at_most" in quality else {"at_least": options.keep}
        new_limits.append({"metric": quality["metric"], **bound, "of": "baseline"})
    if options.max_size is not None:
        if (match := _SIZE.fullmatch(options.max_size.strip())) is None:
            expected = "e.g. 5MB or 800kB"
            raise InputError(f"{options.max_size!r} is not a size.", where="--max-size", expected=expected)
        new_limits.append({"metric": "size_bytes", "at_most": float(match[1]) * _FACTORS[match[2].lower()]})
    if options.max_latency is not None:
        if (match := _LATENCY.fullmatch(options.max_latency.strip())) is None:
            raise InputError(f"{options.max_latency!r} is not a time.", where="--max-latency", expected="e.g. 0.4ms")
        new_limits.append({"metric": "latency_ms", "at_most": float(match[1]) * _IN_MS[match[2]]})
    if not new_limits:
        return
    names = {limit["metric"] for limit in new_limits}
    other_limits = [limit for limit in limits if not (isinstance(limit, dict) and limit.get("metric") in names)]
    # A limit of the recipe on another target stays as it is.
    target = {"target": options.target} if options.target != "cpu" or options.model is not None else {}
    document.values["limits"] = [*other_limits, *({**limit, **target} for limit in new_limits)]


def _block(options: SearchOptions) -> dict[str, object]:
    if options.budget is not None:
        try:
            parse_duration(options.budget)
        except ValueError as error:
            raise InputError(f"{options.budget!r} is not a time.", where="--budget", expected=str(error)) from error
    minimize: list[str] | None = list(options.minimize) or None
    if minimize is None and options.model is not None:
        minimize = ["latency_ms" if options.max_latency is not None else "size_bytes"]
    return {"minimize": minimize, "budget": options.budget, "trials": options.trials}
