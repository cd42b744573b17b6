"""What a user asked for on the command line, as the document of a recipe with a `search:` block."""

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
from compress.formats.registry import FORMATS
from compress.formats.silence import quiet_libraries
from compress.formats.targets import TARGETS
from compress.models.json_file import read_json
from compress.pipeline.checkpoint_headers import read_shape
from compress.plugins.search.default_space import add_default_space, initial_stages, is_possible
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
"""Of the rows of a single file: the share that is held out, and the most."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of the command, as they were given."""

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
    recipe: Path | None, asked: SearchOptions, overrides: Sequence[str] = ()
) -> tuple[Document, Path, str]:
    """The document to search, the folder that its paths count from, and where its recipe comes from.

    A recipe's own, with the options in place of its fields; or, of a model and data, the task's starter with what its
    stages say is worth searching. Raises `InputError`, `RecipeError`.
    """
    if (recipe is None) == (asked.model is None):
        raise InputError(
            "Nothing says what to search." if recipe is None else "Both a recipe and a model are given.",
            expected="a recipe with a `search:` block, or --model with --data",
            hint="compress search RECIPE, or compress search --model M --data D --keep 0.985",
        )
    if recipe is not None:
        document, folder, origin = read_document(recipe), recipe.parent, str(recipe)
    else:
        quiet_libraries()
        document, origin = _begun(asked)
        folder = Path()
    for option in overrides:
        apply_override(document, option)
    _put_limits(document, asked)
    block = document.values.setdefault("search", {}) if recipe is None else document.values.get("search")
    if isinstance(block, dict):
        block |= {name: value for name, value in _block(asked).items() if value is not None}
    if recipe is None:
        add_default_space(document, folder, _SHARES["select"])
    return document, folder, origin


def _begun(asked: SearchOptions) -> tuple[Document, str]:
    """The starter of the task, for the model and the data, and words on it."""
    if asked.task is not None and asked.task not in TASK_NAMES:
        raise InputError(
            f"There is no task {asked.task!r}.{did_you_mean(asked.task, TASK_NAMES)}",
            expected=f"one of {', '.join(TASK_NAMES)}",
        )
    draws = (asked.model or "").endswith(".onnx") or (asked.task is not None and TASKS[asked.task].data)
    if asked.data is None and not draws:
        raise InputError("--model needs --data, which the model is trained on and judged by.", expected="--data D")
    task = asked.task or _told_task(asked.model or "")
    values = deepcopy(dict(TASKS[task].starter))
    values["stages"], more = _stages(TASKS[task], asked.model or "", values["stages"], asked.target)
    if more and "finetune" in more[0]:
        values["baseline"] = "finetune"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", (asked.model or "").removeprefix("sample:").rstrip("/").split("/")[-1])
    values |= {
        "name": f"{name.strip('-.') or 'model'}-search",
        "description": f"what `compress search` found for {asked.model}",
        "task": task,
        "model": asked.model,
        "data": _drawn() if asked.data is None else _rows(asked.data, values.get("data", {})),
        "targets": [asked.target],
    }
    document = Document("the options given")
    document.values = values
    told = f"the starter of {task} (compress recipes new --task {task})"
    kinds = [next(iter(stage)) for stage in more]
    told += f", with {' and '.join(kinds)}" if kinds else ""
    return document, told + (_learned_instead(task, asked.data) if asked.task is None else "")


def _stages(
    task: Task, model: str, starter: Sequence[Mapping[str, Any]], target: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The stages to begin with, for what the model is and will run on, and those of them that the starter has not."""
    if TAKES_ARRAYS in task.capabilities:
        return [dict(stage) for stage in starter], []
    folder = resolve_model(model)
    kind = task.specialize(read_json(folder / "config.json"))
    begun = _of_target(target, kind) or starter
    found = initial_stages(kind, begun, read_shape(folder), partial(is_possible, folder))
    known = [next(iter(stage)) for stage in starter]
    return found, [stage for stage in found if next(iter(stage)) not in known]


def _of_target(target: str, task: Task) -> Sequence[Mapping[str, Any]]:
    """The stages that the target's format would have a search begin with; none where they are not for the task."""
    stages = FORMATS[TARGETS[target].format].searched if target in TARGETS else ()
    fit = all(STAGES[next(iter(stage))].supports(task.capabilities) for stage in stages)
    return stages if fit else ()


def _told_task(model: str) -> str:
    document = Document("--model")
    document.values = {"model": model}
    if not infer_task_of_document(document, Path()):
        # A model that has to be fetched or converted first says it then.
        resolve_model(model)
        infer_task_of_document(document, Path())
    told = document.values.get("task")
    if told is None or not TASKS[told].starter:
        raise InputError(
            f"The model {model!r} doesn't say what it is for.",
            expected=f"--task, one of {', '.join(name for name in TASK_NAMES if TASKS[name].starter)}",
        )
    return str(told)


def _learned_instead(task: str, data: str | None) -> str:
    """Words on the first task that would learn from a column of labels, where the one that the model told has none."""
    if data is None or label_column(TASKS[task].columns) is not None:
        return ""
    names = _names(data)
    for other in TASK_NAMES:
        label = label_column(TASKS[other].columns)
        if label is not None and names.issuperset(one.name for one in TASKS[other].columns if one.given):
            return f"; the rows have a column {label.name!r}, which --task {other} would learn"
    return ""


def _names(reference: str) -> set[str]:
    """Columns of the rows that train, of files that are at hand."""
    place = None if is_sample(reference) else find(reference, Path())
    if place is not None and place.is_dir():
        files = (each for each in sorted(place.iterdir()) if is_file_name(each.name))
        place = next((each for each in files if each.stem == "train"), None)
    return set(read(place, set()).names) if place is not None and place.is_file() else set()


def _rows(reference: str, starter: Mapping[str, Any]) -> dict[str, Any]:
    """The data block; as many tokens of an example count as the starter says."""
    lengths = {name: value for name, value in starter.items() if name == "max_length"}
    return {**_data(reference, starter), **lengths}


def _data(reference: str, starter: Mapping[str, Any]) -> dict[str, Any]:
    """Where rows come from. Of a single file some train, and some are held out to stop by and to judge."""
    columns = {name: value for name, value in (starter.get("columns") or {}).items() if name != value}
    if is_sample(reference) or not (is_file_name(reference) or find(reference, Path())):
        return {"source": reference, "hold_out": [_held("select", 1500)]}
    place = find(reference, Path())
    if place is None:
        raise InputError(f"{reference} does not exist.", where="--data", expected="a file or a folder")
    if place.is_file():
        names = read(place, set()).names
        rows = read(place, names[:1])
        count = len(next(iter(rows.columns.values()), ()))
        sizes = {split: min(int(share * count), most) for split, (share, most) in _SHARES.items()}
        if min(sizes.values()) < 2:
            raise InputError(
                f"{reference} has {count} rows, too few to train, to choose and to judge by.",
                where="--data",
                expected="some hundred rows, or a folder with one file a split",
            )
        return {
            "splits": {"train": str(place.resolve())},
            "hold_out": [_held(split, rows) for split, rows in sizes.items()],
            **_columns(columns, names),
        }
    there = [each for each in sorted(place.iterdir()) if each.is_dir() or is_file_name(each.name)]
    splits = {each.stem: each.name for each in there if each.stem in _SPLITS}
    if "train" not in splits or "test" not in splits:
        raise InputError(
            f"{reference} has no {'train' if 'train' not in splits else 'test'}.",
            where="--data",
            expected="a file or folder for each of train, test and, if you have it, validation",
        )
    train = place / splits["train"]
    more = _columns(columns, read(train, set()).names if train.is_file() else ())
    return {"source": str(place.resolve()), "splits": splits, "hold_out": [_held("select", 1500)], **more}


def _columns(starter: Mapping[str, str], names: Collection[str]) -> dict[str, Any]:
    """The starter's names of columns, where the rows have them; else they have the task's own."""
    there = {name: value for name, value in starter.items() if value in names}
    return {"columns": there} if there else {}


def _drawn() -> dict[str, Any]:
    """Random inputs of a graph, a fifth of them to choose by."""
    return {"splits": {"train": "random:320", "test": "random:128"}, "hold_out": [_held("select", 64)]}


def _held(split: str, rows: int) -> dict[str, Any]:
    return {"rows": rows, "from": "train", "split": split}


def _put_limits(document: Document, asked: SearchOptions) -> None:
    """Limits that are asked for, in place of those of the same metric."""
    limits = list(document.values.get("limits") or [])
    quality = next((limit for limit in limits if isinstance(limit, dict) and limit.get("of")), None)
    if quality is None and asked.model is None:
        quality = {"metric": "accuracy"}
    wanted: list[dict[str, Any]] = []
    if asked.keep is not None:
        if not 0 < asked.keep <= 1.5:
            raise InputError(f"{asked.keep:g} is no share of a quality.", where="--keep", expected="e.g. 0.985")
        if quality is None:
            told = ", ".join(f"{limit['metric']} {limit.get('at_most', limit.get('at_least'))}" for limit in limits)
            raise InputError(
                "Nothing of this task is kept by a share: a graph is compared with itself.",
                where="--keep",
                expected=f"another bound, of {told}",
                hint="e.g. --set limits.0.at_most=0.05",
            )
        # Of what is better the smaller it is, an error say, so much of its inverse.
        bound = {"at_most": 1 / asked.keep} if "at_most" in quality else {"at_least": asked.keep}
        wanted.append({"metric": quality["metric"], **bound, "of": "baseline"})
    if asked.max_size is not None:
        wanted.append({"metric": "size_bytes", "at_most": _bytes(asked.max_size)})
    if asked.max_latency is not None:
        wanted.append({"metric": "latency_ms", "at_most": _milliseconds(asked.max_latency)})
    if not wanted:
        return
    names = {limit["metric"] for limit in wanted}
    kept = [limit for limit in limits if not (isinstance(limit, dict) and limit.get("metric") in names)]
    target = {"target": asked.target} if asked.target != "cpu" or asked.model is not None else {}
    document.values["limits"] = [*kept, *({**limit, **target} for limit in wanted)]


def _block(asked: SearchOptions) -> dict[str, Any]:
    if asked.budget is not None:
        try:
            parse_duration(asked.budget)
        except ValueError as error:
            raise InputError(f"{asked.budget!r} is no time.", where="--budget", expected=str(error)) from error
    minimize: list[str] | None = list(asked.minimize) or None
    if minimize is None and asked.model is not None:
        minimize = ["latency_ms" if asked.max_latency is not None else "size_bytes"]
    return {"minimize": minimize, "budget": asked.budget, "trials": asked.trials}


def _bytes(text: str) -> float:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is no size.", where="--max-size", expected="e.g. 5MB or 800kB")
    return float(match[1]) * _FACTORS[match[2].lower()]


def _milliseconds(text: str) -> float:
    match = _LATENCY.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is no time.", where="--max-latency", expected="e.g. 0.4ms")
    return float(match[1]) * _IN_MS[match[2]]
