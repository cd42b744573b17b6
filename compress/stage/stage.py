"""What a stage is: one transformation of a model, whose fields are its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from compress.stage.record import Cell, StageTable

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel
    from compress.data.dataset import Dataset
    from compress.progress import Progress
    from compress.tasks.task import Examples, Task

Takes = TypeVar("Takes")
Gives = TypeVar("Gives")


@dataclass(frozen=True)
class Context:
    """What a stage may use beside the model it transforms.

    ``earlier`` loads the output of an earlier stage by a label named in `Stage.refers_to`; ``resolve`` turns a model
    reference of the recipe into a local folder; ``locate`` finds a folder of another kind (`Stage.reads`), or raises
    `InputError`. ``scratch`` is a folder for work in progress, to be made when needed:
    it outlives a killed run, and whatever a stage finds there was left by the same stage on the same input. ``remarks``
    and ``tables`` are what `remark` and `tabulate` were told.
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
    remarks: list[str] = field(default_factory=list)
    tables: list[StageTable] = field(default_factory=list)

    def remark(self, text: str) -> None:
        """Say one line that the report keeps with the stage: what was found or chosen, not how far the work is."""
        self.remarks.append(text)
        self.progress.note(text)

    def tabulate(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
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
            from compress.training.predict import predict

            outputs = {examples.answer: predict(model.module, examples)}
            kept = self.task.keep(outputs, examples, range(len(examples)))
            return self.task.measure(kept, examples.labels, "validation", "torch")[0].value

        return merit


@dataclass(frozen=True)
class Needs:
    """What must be there before a stage can run.

    ``without_labels``: a stage that trains can do so on splits that lack labels.
    """

    splits: tuple[str, ...] = ()
    unlabeled: bool = False
    without_labels: bool = False


@dataclass(frozen=True)
class Promise:
    """What a stage says of its output, for the integrity check that follows it.

    ``changes_weights``: at least one weight differs; ``max_size_ratio``: bytes out over bytes in;
    ``same_predictions``: the largest allowed difference between its logits and its input's, or ``None``.
    """

    changes_weights: bool = True
    max_size_ratio: float | None = None
    same_predictions: float | None = None


class Stage(BaseModel, ABC, Generic[Takes, Gives]):
    """One transformation of a model. Subclasses are frozen and declare `kind: Literal[...]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    """Raised when the same parameters would give another output; part of the cache key."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that every such stage calls."""
    tasks: ClassVar[tuple[str, ...] | None] = None
    """The tasks that it is for; ``None`` for all."""
    kind: str

    @classmethod
    def takes(cls) -> type[Any]:
        """The model class that `run` takes."""
        return _arguments(cls)[0]

    @classmethod
    def gives(cls) -> type[Any]:
        """The model class that `run` returns."""
        return _arguments(cls)[1]

    def calls(self) -> tuple[str, ...]:
        """Distributions that it calls as it is set; their versions are part of the cache key."""
        return self.packages

    def wants(self, task: str) -> type[Any]:
        """The class that its input is loaded as, where the name of the task has a say in it."""
        return self.takes()

    def needs(self) -> Needs:
        """The data that must be named in the recipe."""
        return Needs()

    def refers_to(self) -> tuple[str, ...]:
        """Labels of earlier stages (or `start`) whose outputs this stage reads beside its input."""
        return ()

    def reads(self) -> tuple[str, ...]:
        """Local folders that the recipe names and `run` reads, beside models and data."""
        return ()

    def objects_to(self, earlier: Stage[Any, Any]) -> tuple[str | None, str] | None:
        """A field of an earlier stage whose value this one cannot write, and what it expects there; else ``None``.

        Instead of a field, ``None`` stands for the earlier stage itself.
        """
        return None

    def idle_fields(self, task: str) -> tuple[str, ...]:
        """Fields that are set and mean nothing for a task of that name."""
        return ()

    def promise(self) -> Promise:
        """What the integrity check may hold the output to."""
        return Promise()

    def settled(self, sums_in_32_bits: bool) -> Self:
        """The stage with what it leaves to processors decided: whether all of the targets' add 8-bit products so."""
        return self

    def key_fields(self) -> dict[str, Any]:
        """Its parameters, as the cache knows them."""
        return self.model_dump(mode="json")

    @abstractmethod
    def run(self, model: Takes, context: Context) -> Gives:
        """Return the transformed model; ``model`` may be changed in place. Raises `StageError`."""


def _arguments(cls: type[Stage[Any, Any]]) -> tuple[type[Any], type[Any]]:
    for base in cls.__mro__:
        arguments = getattr(base, "__pydantic_generic_metadata__", {}).get("args", ())
        if len(arguments) == 2:
            return arguments[0], arguments[1]
    raise TypeError(f"{cls.__name__} must subclass Stage[Takes, Gives]")
