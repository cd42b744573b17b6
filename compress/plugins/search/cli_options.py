"""Options of `compress search` as a recipe with a `search:` block, also for a model without a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.data.config import is_file_name, is_sample
from compress.data.dataset import label_column
from compress.data.source import find, read
from compress.formats.quiet_output import quiet_libraries
from compress.models.json_file import read_json
from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources, read_shape
from compress.plugins.search.space import StageFields, first_varied
from compress.recipe.document import Document
from compress.recipe.initial_recipe import adapt_stages, first_stages
from compress.recipe.loading import infer_task_of_document, parse_recipe
from compress.recipe.overrides import apply_override
from compress.results.formatting import parse_duration
from compress.results.metrics import describe_metric
from compress.sources.resolve import resolve_model
from compress.stages.cost_model import Shape
from compress.stages.protocols import ChecksModel, predict_cost, search_values
from compress.stages.registry import STAGES
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASK_NAMES, TASKS
from compress.tasks.task import Task
from compress.utils.errors import CompressError, InputError, RecipeError, did_you_mean


def _add_default_space(document: Document, folder: Path) -> None:
    """Add the fields that stages after the baseline declare worth searching to the document's `search:` block.

    The document is a recipe without choices, whose paths are relative to ``folder``; it is changed in place.
    Raises `RecipeError` where it is not valid.
    """
    values = document.values
    selection = next(split for split in values["data"]["hold_out"] if split["split"] == "select")
    values["search"]["select"] = {name: value for name, value in selection.items() if name != "split"}
    # Validate candidate values on a recipe without a search block, which is not complete yet.
    copy = deepcopy(document)
    copy.values.pop("search")
    recipe = parse_recipe(copy, folder)
    sources = Sources(recipe, folder)
    start = sources.find_all()
    # Hold out at most the given share of the training rows.
    rows = next((source.rows for source in sources.rows if source.role == "split train" and source.rows), None)
    if rows is not None and selection["rows"] == _SELECT_ROWS and _SELECT_SHARE * rows < _SELECT_ROWS:
        selection["rows"] = values["search"]["select"]["rows"] = max(int(_SELECT_SHARE * rows), 2)
    context = plan_context(recipe, sources, start)
    metrics = (*values["search"]["minimize"], *(limit.metric for limit in recipe.limits))
    timed = any(describe_metric(name).timed for name in metrics)
    choices: dict[str, list[object]] = {}
    optional: list[str] = []
    shape: Shape | None = start
    for index, (stage, label) in enumerate(zip(recipe.stages, recipe.labels(), strict=True)):
        if index >= first_varied(recipe):
            for name, candidates in search_values(stage, shape, timed).items():
                field = f"stages.{index}.{stage.kind}.{name}"
                possible = [value for value in candidates if _is_valid(copy, folder, field, value)]
                if possible:
                    choices[field] = possible
            if search_values(stage, shape, timed=True) and stage.input_type is stage.output_type:
                optional.append(label)
        # Later stages start from the shape that this stage leaves.
        shape = context.shapes[label] = predict_cost(stage, shape, context).shape
    values["search"] |= {"choices": choices, "optional": optional}


def is_possible(model: Path, kind: str, fields: StageFields) -> bool:
    """Return whether a model's architecture has the parts that a stage prunes."""
    try:
        stage = STAGES[kind].model_validate({**fields, "kind": kind})
        if isinstance(stage, ChecksModel):
            stage.check_model(model)
    except (CompressError, ValidationError):
        return False
    return True


def _is_valid(document: Document, folder: Path, field: str, value: object) -> bool:
    """Return whether the recipe is valid with this value."""
    changed = deepcopy(document)
    apply_override(changed, f"{field}={json.dumps(value)}")
    try:
        parse_recipe(changed, folder)
    except RecipeError:
        return False
    return True


_FINETUNE, _PRUNE, _DISTILL = "finetune", "prune", "distill"
_FULL_SIZE: tuple[StageFields, ...] = ({"onnx": {}}, {"onnx_int8": {}})
"""Stages that apply to every model that answers in one forward pass."""
_NARROWER, _FEWER_CHANNELS = ({"feed_forward": 0.25}, {"heads": 0.25}, {"heads": 0.5}), ({"flops": 0.3},)
"""Mild pruning of models with attention, and of models without."""


def initial_stages(
    task: Task, starter: Sequence[StageFields], shape: Shape | None, is_possible: Callable[[str, StageFields], bool]
) -> list[StageFields]:
    """Return the stages of a recipe for a task and a model.

    Where the task's stages allow it, the trained model is pruned by what its architecture has, and then
    distilled. Without that, most tasks would have only the number of bits to choose. A student model that the
    starter names is ignored, because it belongs to another model.

    Args:
        task: Task.
        starter: Stages of the task's starter recipe.
        shape: Structure of the model; None if unknown.
        is_possible: Function that returns whether a kind of stage with these fields applies to the model.

    Returns:
        Stages as a recipe writes them.
    """
    stages = adapt_stages(task, starter, shape, is_possible)
    kinds = [next(iter(stage)) for stage in stages]
    if _PRUNE in kinds or shape is None or not _fits(_PRUNE, task):
        return stages
    if _FINETUNE not in kinds:
        if not _fits(_FINETUNE, task) or kinds[: len(_FULL_SIZE)] != [next(iter(stage)) for stage in _FULL_SIZE]:
            return stages
        stages.insert(0, {_FINETUNE: {"epochs": 2}})
    # Add the first possible `prune` stage after `finetune`, and `distill` after it if there is none.
    position = next(index for index, stage in enumerate(stages) if _FINETUNE in stage)
    prunings = () if shape is None or not _fits(_PRUNE, task) else _NARROWER if shape.attention else _FEWER_CHANNELS
    pruning = next((pruning for pruning in prunings if is_possible(_PRUNE, pruning)), None)
    if pruning is None:
        return stages
    more: list[StageFields] = [{_PRUNE: dict(pruning)}]
    if _fits(_DISTILL, task) and not any(_DISTILL in stage for stage in stages):
        settings = {name: value for name, value in stages[position][_FINETUNE].items() if name != "learning_rate"}
        more.append({_DISTILL: {"teacher": _FINETUNE, **settings}})
    return [*stages[: position + 1], *more, *stages[position + 1 :]]


def _fits(kind: str, task: Task) -> bool:
    return STAGES[kind].supports(task.capabilities)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]")
_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)")
_IN_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_SPLITS = ("train", "validation", "test")
_SELECT_SHARE, _SELECT_ROWS = 0.2, 1500
"""Share of the training rows that is held out to select by, and the largest number."""


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
    recipe: Document | None, options: SearchOptions, overrides: Sequence[str] = ()
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
        document, folder, origin = recipe, Path(recipe.file).parent, recipe.file
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
        _add_default_space(document, folder)
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
        "data": _source(options.data, values.get("data", {})),
        "targets": [options.target],
    }
    document = Document("the options given")
    document.values = values
    source = f"the starter of {task}"
    source += f", with {' and '.join(next(iter(stage)) for stage in more)}" if more else ""
    return document, source + (_hint_at_labels(task, options.data) if options.task is None else "")


def _stages(
    task: Task, model: str, starter: Sequence[StageFields], target: str
) -> tuple[list[StageFields], list[StageFields]]:
    """Return the initial stages for the model and target, and those of them that the starter lacks."""
    if TAKES_ARRAYS in task.capabilities:
        return [dict(stage) for stage in starter], []
    folder = resolve_model(model)
    kind = task.specialize(read_json(folder / "config.json"))
    first = first_stages(kind, starter, target)
    stages = initial_stages(kind, first, read_shape(folder), partial(is_possible, folder))
    starter_kinds = [next(iter(stage)) for stage in starter]
    return stages, [stage for stage in stages if next(iter(stage)) not in starter_kinds]


def _infer_task(model: str) -> str:
    document = Document("--model")
    document.values = {"model": model}
    # The task of a model that has to be downloaded or converted is known only afterwards.
    if not infer_task_of_document(document, Path()):
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


def _source(reference: str | None, starter: Mapping[str, Any]) -> dict[str, object]:
    """Return the data block: the source of rows, and the starter's maximum number of tokens.

    A single file is split into training, validation, test and selection rows. A graph without data gets random inputs,
    a fifth of them for selection.
    """
    if reference is None:
        splits = {"train": "random:320", "test": "random:128"}
        return {"splits": splits, "hold_out": [_hold_out("select", 64)]}
    lengths = {name: value for name, value in starter.items() if name == "max_length"}
    columns = {name: value for name, value in (starter.get("columns") or {}).items() if name != value}
    if is_sample(reference) or not (is_file_name(reference) or find(reference, Path())):
        return {"source": reference, "hold_out": [_hold_out("select", _SELECT_ROWS)], **lengths}
    path = find(reference, Path())
    if path is None:
        raise InputError(f"{reference} does not exist.", where="--data", expected="a file or a folder")
    if path.is_file():
        names, hold_out = _read_selection(path, reference)
        return {"source": str(path.resolve()), "hold_out": hold_out, **_columns(columns, names), **lengths}
    entries = [entry for entry in sorted(path.iterdir()) if entry.is_dir() or is_file_name(entry.name)]
    splits = {entry.stem: entry.name for entry in entries if entry.stem in _SPLITS}
    if missing := [split for split in ("train", "test") if split not in splits]:
        raise InputError(
            f"{reference} has no {missing[0]}.",
            where="--data",
            expected="a file or folder for each of train, test and, if you have it, validation",
        )
    train = path / splits["train"]
    names, hold_out = (
        _read_selection(train, reference) if train.is_file() else ((), [_hold_out("select", _SELECT_ROWS)])
    )
    return {
        "source": str(path.resolve()),
        "splits": splits,
        "hold_out": hold_out,
        **_columns(columns, names),
        **lengths,
    }


def _read_selection(path: Path, reference: str) -> tuple[tuple[str, ...], list[dict[str, object]]]:
    """Return the column names of a file with training rows, and which share of its rows is for selection."""
    # Read the names first, so that only one column is loaded for counting.
    names = read(path, set()).names
    count = len(next(iter(read(path, names[:1]).columns.values()), ()))
    if (rows_to_select_by := min(int(_SELECT_SHARE * count), _SELECT_ROWS)) < 2:
        raise InputError(
            f"{reference} has {count} rows, too few for training, selection and test.",
            where="--data",
            expected="some hundred rows, or a folder with one file a split",
        )
    return names, [_hold_out("select", rows_to_select_by)]


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
    default = None if options.model is None else ["latency_ms" if options.max_latency is not None else "size_bytes"]
    return {"minimize": list(options.minimize) or default, "budget": options.budget, "trials": options.trials}
