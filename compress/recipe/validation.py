"""What must hold between the parts of a recipe: stages chain, labels exist, splits are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from compress.data.arrays import draws
from compress.data.config import DataConfig, is_file_name
from compress.data.samples.sample import INSTALL, known_samples
from compress.formats.target_profile import Profile
from compress.models.checkpoint import Checkpoint
from compress.models.torch_model import TorchModel
from compress.recipe.chosen_target import ChosenTarget, profile_of
from compress.recipe.chosen_target import writer as writer_of
from compress.recipe.document import Document, FieldPath, describe
from compress.recipe.recipe import ANOTHER_STUDENT, START, Benchmark, read_and_drawn, stage_labels
from compress.stages.base import Reference, Stage
from compress.stages.registry import STAGES
from compress.tasks.capability import DRAWS, EMBEDS, GENERATES, HAS_TWO_TOWERS, READS_ROWS, TAKES_TEXT
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.tasks.task import Task
from compress.utils.errors import nearest_name

T = TypeVar("T")

_SLICES = ("slices",)
_ROWS_ONLY = (_SLICES, ("data", "labels"), ("benchmark", "rate"), ("benchmark", "batch_size"))
_NOT_OF_TEXT = ("similarity", "templates", "judge", "pictures")
_GENERATING_ONLY = (
    *(("evaluation", name) for name in Evaluation.model_fields if name not in _NOT_OF_TEXT),
    ("data", "also"),
    ("benchmark", "contexts"),
    ("benchmark", "tokens"),
)
_ONLY = {
    frozenset({READS_ROWS}): _ROWS_ONLY,
    frozenset({GENERATES}): _GENERATING_ONLY,
    frozenset({EMBEDS, TAKES_TEXT}): (("evaluation", "similarity"),),
    frozenset({HAS_TWO_TOWERS}): (("evaluation", "templates"),),
    frozenset({DRAWS}): (("evaluation", "judge"), ("evaluation", "pictures")),
}
"""Fields of tasks with certain capabilities alone. A run's own recipe has all at their defaults."""
_DEFAULTS = {
    section: {name: to_jsonable_python(getattr(model, name)) for name in type(model).model_fields}
    for section, model in (("data", DataConfig()), ("evaluation", Evaluation()), ("benchmark", Benchmark()))
}


@dataclass(frozen=True)
class Part:
    """One stage of a document. ``stage`` is what of it is valid; ``whole`` if nothing was left out."""

    index: int
    kind: str
    path: FieldPath
    fields: dict[str, Any]
    stage: Stage[Any, Any] | None
    whole: bool

    @property
    def cls(self) -> type[Stage[Any, Any]] | None:
        return STAGES.get(self.kind)


def check_parts(
    document: Document,
    parts: list[Part | None],
    targets: Sequence[str | ChosenTarget],
    kinds: Sequence[Task],
    starts_as: type[Any] = TorchModel,
) -> None:
    """Note every problem between parts, wherever the parts it needs are valid; ``targets`` are those that are.

    ``kinds`` is what the task can be, none where it is unknown; what is right for one of them is right. ``starts_as``
    is what the starting model is.
    """
    profiles = [profile_of(entry) for entry in targets]
    labels = stage_labels([_meant_kind(part) for part in parts])
    _check_chain(document, parts, starts_as, kinds)
    _check_formats(document, [part for part in parts if part], profiles)
    _check_references(document, parts, labels, starts_as)
    _check_one_of(document, ("baseline",), START, (START, *labels), "the label of a stage")
    _check_limits(document, labels, [profile.name for profile in profiles])
    _check_splits(document, [part for part in parts if part])
    _check_samples(document, parts)
    _check_students(document, [part for part in parts if part])
    _check_task(document, [part for part in parts if part], kinds)


def _check_task(document: Document, parts: list[Part], kinds: Sequence[Task]) -> None:
    """No stage and no field that means nothing for the recipe's task."""
    if not kinds:
        return
    task, able = kinds[0].name, [kind.capabilities for kind in kinds]
    for part in parts:
        if part.cls and not any(part.cls.supports(capabilities) for capabilities in able):
            others = [name for name, other in TASKS.items() if part.cls.supports(other.capabilities)]
            document.problem(part.path, f"{part.kind}, for {task}", f"a recipe for {_and(others)}")
        for name in _in_all([part.stage.idle_fields(capabilities) for capabilities in able] if part.stage else []):
            document.problem(
                (*part.path, name), describe(getattr(part.stage, name)), f"nothing: it means nothing for {task}"
            )
    idle = [[path for needed, paths in _ONLY.items() if not needed <= one for path in paths] for one in able]
    for path in _in_all(idle):
        value, default = _value(document, path, None), _DEFAULTS.get(path[0], {}).get(path[-1])
        if path == _SLICES and isinstance(value, list):  # by a column of the rows, running text has slices too
            value = [part for part in value if isinstance(part, dict) and "length" in part]
        if value not in (None, [], default):
            document.problem(path, describe(value), f"nothing: it means nothing for {task}")


def _in_all(lists: Sequence[Sequence[T]]) -> list[T]:
    """What stands in every list, in the order of the first."""
    return [one for one in lists[0] if all(one in other for other in lists[1:])] if lists else []


def _meant_kind(part: Part | None) -> str:
    if part is None:
        return "?"
    return part.kind if part.cls else nearest_name(part.kind, list(STAGES)) or part.kind


def _check_chain(document: Document, parts: list[Part | None], starts_as: type[Any], kinds: Sequence[Task]) -> None:
    gives: type[Any] | None = starts_as
    giver = "the starting model"
    for part in parts:
        cls = part.cls if part else None
        taken = part is parts[0] and cls is not None and cls.starts_from_graph and starts_as is not TorchModel
        if part and cls and gives and not taken and not follows(gives, cls, kinds):
            takes = _a(wanted(cls, kinds)[0])
            found = f"{part.kind}, which takes {takes}, after {giver}, which is {_a(gives)}"
            document.problem(part.path, found, _fits(gives, cls, kinds))
        gives = cls.output_type() if cls else None
        giver = f"the output of stage {part.index} ({part.kind})" if part else ""


def _check_formats(document: Document, parts: list[Part], profiles: Sequence[Profile]) -> None:
    """What a stage writes, named or brought in by a target, holds what the stages before it make."""
    writers = [(part.stage, parts[:place]) for place, part in enumerate(parts) if part.stage]
    for profile in profiles:
        writer = writer_of(profile.target.format, profile.options)
        if writer is not None and writer.kind not in [part.kind for part in parts]:
            writers.append((writer, parts))
    for writer, before in writers:
        for part in {part.kind: part for part in before}.values():
            unsafe_member_reason = writer.conflicts_with(part.stage) if part.whole and part.stage else None
            if unsafe_member_reason is not None:
                field, expected = unsafe_member_reason
                if field is None:
                    document.problem(part.path, f"{part.kind}, before {writer.kind}", expected)
                else:
                    document.problem((*part.path, field), describe(getattr(part.stage, field)), expected)


def chains(gives: type[Any], takes: type[Any]) -> bool:
    """Whether a stage can read what another left: an unquantized Hugging Face folder is read whole or in pieces."""
    return issubclass(gives, takes) or {gives, takes} == {TorchModel, Checkpoint}


def wanted(cls: type[Stage[Any, Any]], kinds: Sequence[Task]) -> list[type[Any]]:
    """The class that a stage takes in a recipe of a task, for each of its kinds that the stage is for."""
    able = [kind.capabilities for kind in kinds if cls.supports(kind.capabilities)]
    if cls.preferred_input is Stage.preferred_input or not able:
        return [cls.input_type()]
    stage = cls.model_construct(kind=cls.model_fields["kind"].default)
    return [stage.preferred_input(capabilities) for capabilities in able]


def follows(gives: type[Any], cls: type[Stage[Any, Any]], kinds: Sequence[Task]) -> bool:
    """Whether a stage can read what another left, in a recipe of a task of one of ``kinds``."""
    return any(chains(gives, takes) for takes in wanted(cls, kinds))


def _fits(gives: type[Any], cls: type[Stage[Any, Any]], kinds: Sequence[Task]) -> str:
    able = [kind.capabilities for kind in kinds]
    known = {kind: other for kind, other in STAGES.items() if not able or any(map(other.supports, able))}
    here = [kind for kind, other in known.items() if follows(gives, other, kinds)]
    between = [kind for kind in here if follows(known[kind].output_type(), cls, kinds)]
    bridge = f", or {' or '.join(between)} between the two" if between else ""
    return f"a stage that takes {_a(gives)} ({', '.join(here)}){bridge}"


def _a(model: type[Any]) -> str:
    return f"{'an' if model.__name__[0] in 'AEIOU' else 'a'} {model.__name__}"


def _check_references(
    document: Document, parts: list[Part | None], labels: tuple[str, ...], starts_as: type[Any]
) -> None:
    for part in parts:
        for label in part.stage.earlier_outputs() if part and part.stage else ():
            assert part
            earlier = labels[: part.index]
            path = _field_with(part, label)
            if label in labels and label not in earlier:
                order = "its own output" if label == labels[part.index] else "a later stage"
                document.problem(path, f"{label!r}, {order}", f"an earlier stage: {_listed(earlier)}")
            elif label != START and label not in earlier:
                near = nearest_name(label, [START, *earlier])
                document.problem(path, describe(label), f"an earlier stage: {_listed(earlier)}", near)
            else:
                other = parts[labels.index(label)] if label != START else None
                gives = starts_as if label == START else other.cls.output_type() if other and other.cls else TorchModel
                if not issubclass(gives, TorchModel):
                    found = f"{label!r}, which gives {_a(gives)}"
                    document.problem(path, found, f"a stage that gives {_a(TorchModel)}")


def _field_with(part: Part, value: str) -> FieldPath:
    """The stage's field that holds ``value``, so that the problem gets its line."""
    return next(((*part.path, name) for name, held in part.fields.items() if held == value), part.path)


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join((START, *labels))


def _check_limits(document: Document, labels: tuple[str, ...], targets: Sequence[str]) -> None:
    whole = not any(path[:1] == ("targets",) for path in document.broken)
    limits = document.values.get("limits")
    for index in range(len(limits) if isinstance(limits, list) else 0):
        path = ("limits", index)
        _check_one_of(document, (*path, "of"), None, (START, "baseline", *labels), "a model of the run")
        if whole:
            _check_one_of(document, (*path, "target"), "cpu", targets, "one of the recipe's targets")


def _check_one_of(document: Document, path: FieldPath, default: Any, known: Sequence[str], what: str) -> None:
    value = _value(document, path, default)
    if value is not None and value not in known:
        document.problem(path, describe(value), f"{what}: {', '.join(known)}", nearest_name(value, known))


def _check_splits(document: Document, parts: list[Part]) -> None:
    data = document.values.get("data")
    splits = _value(document, ("data", "splits"), DataConfig().splits) if isinstance(data, dict) else None
    if splits is None:
        return
    told = _value(document, ("data", "hold_out"), [], broken=[])
    held = [
        each.get("split", "select") for each in (told if isinstance(told, list) else [told]) if isinstance(each, dict)
    ]
    known = [*splits, *held]
    listed = ", ".join(known) or "none"
    path = ("data", "splits") if "splits" in data else ("data",)
    if "test" not in known:
        document.problem(path, f"the splits {listed}", "a split `test`, on which the result is measured")
    for split in dict.fromkeys(
        split for part in parts if part.whole and part.stage for split in part.stage.needs().splits
    ):
        users = [part.kind for part in parts if part.whole and part.stage and split in part.stage.needs().splits]
        if split not in known:
            document.problem(path, f"the splits {listed}", f"a split {split!r}, which {_and(users)} reads")
    bare = _value(document, ("data", "without_labels"), [], broken=[])
    for part in parts:
        if part.stage is None or not part.stage.needs().labels:
            continue
        if lacking := [split for split in part.stage.needs().splits if split in bare]:
            expected = f"labels in {lacking[0]}, which {part.kind} trains on"
            document.problem(("data", "without_labels"), describe(bare), expected)
    for split, source in splits.items():
        if split != "test" and source == splits.get("test") and draws(source, split) is None:
            expected = "other rows: the test split must be seen by nothing else"
            document.problem((*path, split), f"{source!r}, the same as test", expected)
    if _value(document, ("data", "source"), None, broken="?") is None:
        loose = [source for source in splits.values() if _is_loose(source)]
        if loose:
            expected = "a source, since not every split names a file (.csv, .jsonl, .json or .parquet)"
            document.problem(("data", "source"), f"no source for {', '.join(map(repr, loose))}", expected)
    _check_unlabeled(document, parts)


def _is_loose(name: str) -> bool:
    """Whether a split's name is one within a source."""
    return not is_file_name(name) and "/" not in name and draws(name, "") is None


def _check_samples(document: Document, parts: list[Part | None]) -> None:
    """Every `sample:NAME` is in the catalogue, as a model or as data, whichever its field wants."""
    wanted: list[tuple[FieldPath, str]] = [(("model",), "model"), (("data", "source"), "data")]
    wanted += [(("evaluation", name), "data") for name in ("similarity", "questions")]
    wanted.append((("evaluation", "judge"), "model"))
    data = document.values.get("data")
    unlabeled = data.get("unlabeled") if isinstance(data, dict) else None
    count = len(unlabeled) if isinstance(unlabeled, list) else 0
    wanted += [(("data", "unlabeled", index), "data") for index in range(count)]
    named = _references([part for part in parts if part])
    wanted += [(path, "model") for path, reference in named if reference.kind == "model"]
    for path, kind in wanted:
        reference = _value(document, path, None)
        if isinstance(reference, str) and reference.startswith("sample:"):
            names = [f"sample:{name}" for name, sample in known_samples().items() if sample.kind == kind]
            if reference not in names:
                near = nearest_name(reference, names)
                listed = ", ".join(names) or f"those of a package that is not installed: {INSTALL} in a checkout"
                document.problem(path, describe(reference), f"one of the {kind} samples {listed}", near)


def _check_students(document: Document, parts: list[Part]) -> None:
    """No name stands for weights that are read and for others that are drawn."""
    model = _value(document, ("model",), None)
    stages = [part.stage for part in parts if part.stage]
    twice = read_and_drawn(model, stages) if isinstance(model, str) else None
    for path, reference in _references(parts):
        if twice is not None and reference.name == twice:
            document.problem(path, describe(twice), ANOTHER_STUDENT)


def _references(parts: list[Part]) -> list[tuple[FieldPath, Reference]]:
    """The fields of stages that name models and folders."""
    named = [(part, field, one) for part in parts if part.stage for field, one in part.stage.references().items()]
    return [((*part.path, *field.split(".")), one) for part, field, one in named]


def _check_unlabeled(document: Document, parts: list[Part]) -> None:
    if _value(document, ("data", "unlabeled"), [], broken=["?"]):
        return
    for part in parts:
        if part.whole and part.stage and part.stage.needs().unlabeled:
            expected = f"at least one source of unlabeled text, which {part.kind} reads"
            document.problem(("data", "unlabeled"), "no unlabeled text", expected)
            return


def _and(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _value(document: Document, path: FieldPath, default: Any, broken: Any = None) -> Any:
    """The value at a path, ``default`` where the recipe has none, ``broken`` where it is not valid."""
    if any(known[: len(path)] == path for known in document.broken):
        return broken
    value = document.values
    for step in path:
        if isinstance(value, dict):
            if step not in value:
                return default
            value = value[step]
        elif isinstance(value, list) and step in range(len(value)):
            value = value[int(step)]
        else:
            return broken
    return value
