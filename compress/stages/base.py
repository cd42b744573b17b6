"""What a stage is: one transformation of a model, whose fields are its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from compress.results.report import Cell, StageTable
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.tasks.capability import Capabilities, suits

if TYPE_CHECKING:
    from compress.data.dataset import Dataset
    from compress.models.torch_model import TorchModel
    from compress.tasks.task import Examples, Task
    from compress.utils.progress import Progress


SEARCH, SEARCH_TIMES = "search", "search_times"
"""What of a field's metadata says which of its values a search should try."""
Takes = TypeVar("Takes")
Gives = TypeVar("Gives")


@dataclass(frozen=True)
class Context:
    """What a stage may use beside the model it transforms.

    ``earlier`` loads the output of an earlier stage by a label named in `Stage.refers_to`; ``resolve`` turns a model
    reference of the recipe into a local folder; ``locate`` finds a folder of another kind (`Stage.paths`), or raises
    `InputError`. ``scratch`` is a folder for work in progress, to be made when needed:
    it outlives a killed run, and whatever a stage finds there was left by the same stage on the same input. ``shared``
    gives such a folder by a key, of which other stages and runs may write the same at the same time; without it they
    lie in ``scratch``. ``notes`` and ``tables`` hold what `note` and `add_table` were given.
    """

    task: Task
    data: Dataset
    max_length: int
    seed: int
    progress: Progress
    earlier: Callable[[str], TorchModel]
    resolve: Callable[[str], Path]
    scratch: Path
    locate: Callable[[str], Path] = Path
    shared: Callable[[str], Path] | None = None
    notes: list[str] = field(default_factory=list)
    tables: list[StageTable] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say one line that the report keeps with the stage: what was found or chosen, not how far the work is."""
        self.notes.append(text)
        self.progress.note(text)

    def add_table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Keep a table that the report shows with the stage; nothing is said of it on the way."""
        self.tables.append(StageTable(title=title, columns=tuple(columns), rows=tuple(tuple(row) for row in rows)))

    def encode(self, split: str, model: TorchModel) -> Examples:
        """The examples of a split as inputs of ``model``, with label ids where the split is labeled."""
        return self.task.encode(self.data.split(split), model.processor, model.labels(), self.max_length)

    def encode_unlabeled(self, model: TorchModel) -> Examples | None:
        """The recipe's unlabeled text as inputs of ``model``, if it names any."""
        rows = self.data.unlabeled
        return None if rows is None else self.task.encode(rows, model.processor, None, self.max_length)

    def validator(self, model: TorchModel) -> Callable[[], float] | None:
        """A function that returns the task's first metric on the validation split, or ``None`` without one."""
        if "validation" not in self.data.splits:
            return None
        examples = self.encode("validation", model)

        def merit() -> float:
            from compress.tasks.inference import merit

            return merit(self.task, model.module, examples)

        return merit


@dataclass(frozen=True)
class Needs:
    """What must be there before a stage can run; ``labels``: the splits must have them."""

    splits: tuple[str, ...] = ()
    unlabeled: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Promise:
    """What a stage says of its output, for the integrity check that follows it.

    ``changes_weights``: at least one weight differs; ``max_size_ratio``: bytes out over bytes in, beside
    ``overhead_bytes`` that any model may have: scales, and tensors too small to shrink. ``hint`` says what may help
    where it isn't kept.
    """

    changes_weights: bool = True
    max_size_ratio: float | None = None
    overhead_bytes: int = 0
    hint: str | None = None


@dataclass(frozen=True)
class Reference:
    """A model, an adapter or another folder that a field of a stage names.

    ``name`` is a local path or, of a model, also a Hugging Face id or `sample:NAME`. With ``random_weights`` only the
    model's config is read, and weights are drawn.
    """

    name: str
    kind: Literal["model", "adapter", "folder"] = "model"
    random_weights: bool = False


@dataclass(frozen=True)
class IntegerWeights:
    """Weights that a stage stores as integers, for the stages that write them in another format.

    ``bits`` at most; ``group_size`` weights of a row share a scale, -1 for the whole row. ``group_field`` and
    ``zero_points_field`` name the stage's fields that decide these; ``no_zero_points`` says what the latter must be for
    integers without zero points.
    """

    bits: int
    group_size: int
    zero_points: bool
    group_field: str
    zero_points_field: str
    no_zero_points: str


class Stage(BaseModel, ABC, Generic[Takes, Gives]):
    """One transformation of a model. Subclasses are frozen and declare `kind: Literal[...]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    """Raised when the same parameters would give another output; part of the cache key."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that every such stage calls."""
    requires: ClassVar[Capabilities] = frozenset()
    """What a task must be for the stage to be of use to it (`compress.tasks.capability`)."""
    excludes: ClassVar[Capabilities] = frozenset()
    """What a task must not be."""
    trains: ClassVar[bool] = False
    """Whether several launched processes train together in `run`."""
    integer_graph: ClassVar[bool] = False
    """Whether it puts integers into an ONNX graph."""
    adapter_beside: ClassVar[bool] = False
    """Whether it leaves an adapter beside the weights, not merged."""
    starts_from_graph: ClassVar[bool] = False
    """Whether an ONNX graph that a recipe starts from is taken in place of a torch model."""
    reads: ClassVar[Needs] = Needs()
    """The data that every such stage needs."""
    promised: ClassVar[Promise] = Promise()
    """What every such stage promises."""
    decides_shape_by_data: ClassVar[bool] = False
    """Whether all rows, which it reads in no time to speak of, decide how large its output is."""
    keeps_shape: ClassVar[bool] = False
    """Whether its output is stored as its input is: no parameter to speak of comes or goes."""
    uses_device: ClassVar[bool] = False
    """Whether it computes on the recipe's device (`compress.utils.torch_device`), as every stage does that `trains`."""
    imatrix_beside: ClassVar[bool] = False
    """Whether it leaves an importance matrix beside the weights."""
    scales_inputs: ClassVar[bool] = False
    """Whether layers are given other inputs than before, so that an adapter trained before fits no longer."""
    kind: str

    @classmethod
    def input_type(cls) -> type[Any]:
        """The model class that `run` takes."""
        return _arguments(cls)[0]

    @classmethod
    def output_type(cls) -> type[Any]:
        """The model class that `run` returns."""
        return _arguments(cls)[1]

    def calls(self) -> tuple[str, ...]:
        """Distributions that it calls as it is set; their versions are part of the cache key."""
        return self.packages

    @classmethod
    def is_for(cls, task: Capabilities) -> bool:
        """Whether it is of use to a task with those capabilities."""
        return suits(task, cls.requires, cls.excludes)

    def wants(self, task: Capabilities) -> type[Any]:
        """The class that its input is loaded as, where the task has a say in it."""
        return self.input_type()

    def needs(self) -> Needs:
        """The data that must be named in the recipe."""
        return self.reads

    def refers_to(self) -> tuple[str, ...]:
        """Labels of earlier stages (or `start`) whose outputs this stage reads beside its input."""
        return ()

    def paths(self) -> Mapping[str, Reference]:
        """Fields that name models or local folders, such as `student.model`, and what they name."""
        return {}

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """What it will cost on an input of a shape, and the shape of its output; called in the recipe's order.

        By default the shape is kept, and nothing is known of the costs but the size where a stage ``keeps_shape``.
        """
        if self.keeps_shape:
            return predicted(before, before)
        unknown = predicted(before, before, Estimate.unknown("not predicted by the stage"))
        return replace(unknown, disk_bytes=Estimate.unknown("the size of its output is not known before it runs"))

    def rehearse(self, model: Takes, context: Context) -> Gives | None:
        """Its output but for what only training decides, the values of weights: a moment's work.

        A search counts a recipe's bytes by it before anything is trained. None where only running it tells; ``model``
        may be changed in place. Raises what `run` raises.
        """
        return None

    def passes(self, examples: float) -> tuple[float, float]:
        """How many of the training split's examples it reads, and from how many it learns, each epoch counted."""
        return examples, examples * getattr(self, "epochs", 1.0) if self.trains else 0.0

    def zeros_weights(self) -> bool:
        """Whether a share of the weights becomes zero and stays in the files."""
        return False

    def integers(self) -> tuple[IntegerWeights, ...]:
        """What of a checkpoint's weights it stores as integers."""
        return ()

    def objects_to(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """A field of an earlier stage whose value this one cannot write, and what it expects there; else ``None``.

        Instead of a field, ``None`` stands for the earlier stage itself.
        """
        return None

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """Fields that are set and mean nothing for a task with those capabilities."""
        return ()

    def wanted_precision(self) -> Mapping[str, Any] | None:
        """What it makes of ONNX's weights, in fields of a stage that writes a format of other integers.

        `{"precision": "int8", "embedding_bits": 4}`: such a format is written from the weights before, as finely; with
        ``None`` a stage has no say in it.
        """
        return None

    def without_rounding(self) -> Self:
        """The same, to write another output than its own in its format: as finely as that is."""
        return self

    def check_data(self, start: Path, context: Context) -> None:
        """Prove before the run that running text will do, read as the starting model does. Raises `DataError`."""

    def check_model(self, start: Path) -> None:
        """Raise a `CompressError` for a starting model, in a folder, that the stage cannot be applied to."""

    def check_widths(self, start: Path, before: Sequence[Stage[Any, Any]]) -> None:
        """As `check_model`, of the sides of matrices, as the stages ``before`` leave the starting model's."""

    def cut_widths(self, model: Any) -> bool:
        """Cut a starting model without weights, in place, to the widths of the output; False where none can tell."""
        return True

    def worth_searching(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Fields that a search should vary, and the values it should try, for an input of a shape.

        A field says them itself, as `search` in its metadata (`json_schema_extra`), or as `search_times` where they
        are worth trying for the sake of time alone, which counts if ``timed``; its own value is tried too.
        """
        wanted = (SEARCH, SEARCH_TIMES) if timed else (SEARCH,)
        told = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        extras = {name: extra for name, extra in told.items() if isinstance(extra, dict)}
        return {
            name: tuple(extra[key])  # type: ignore[arg-type]
            for name, extra in extras.items()
            for key in wanted
            if key in extra
        }

    def shortened(self, share: float) -> Self:
        """The stage with a share of its training, for a search that looks early; itself where it does not train."""
        return self

    def trained_as_usual(self) -> Self:
        """The stage with every field by default that only says how it trains; itself where it does not train.

        Both leave models that differ in nothing but the values of their weights.
        """
        return self

    def with_usual_tables(self) -> Self:
        """The stage with every field by default that says something of embedding tables alone.

        Both leave models that differ in nothing but their tables, whatever else the model has.
        """
        return self

    def promise(self) -> Promise:
        """What the integrity check may hold the output to."""
        return self.promised

    def settled(self, sums_in_32_bits: bool) -> Self:
        """The stage with what it leaves to processors decided: whether all of the targets' add 8-bit products so."""
        return self

    @abstractmethod
    def run(self, model: Takes, context: Context) -> Gives:
        """Return the transformed model; ``model`` may be changed in place. Raises `StageError`."""


def _arguments(cls: type[Stage[Any, Any]]) -> tuple[type[Any], type[Any]]:
    for base in cls.__mro__:
        arguments = getattr(base, "__pydantic_generic_metadata__", {}).get("args", ())
        if len(arguments) == 2:
            return arguments[0], arguments[1]
    raise TypeError(f"{cls.__name__} must subclass Stage[Takes, Gives]")


def references(stages: Iterable[Stage[Any, Any]]) -> list[Reference]:
    """All that the stages' fields name, in their order."""
    return [reference for stage in stages for reference in stage.paths().values()]
