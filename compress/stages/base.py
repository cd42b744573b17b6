"""Interface of a stage: one transformation of a model, whose fields are its parameters.

An author of a stage needs ``kind``, fields, `Stage.required_data` and `Stage.run`. What some stages do beyond that,
such as predicting their cost, is declared by the protocols in `compress.stages.protocols`.

A stage is a pydantic model: its fields are the recipe's fields, and its values are part of the cache key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from compress.results.report import Cell, StageTable
from compress.tasks.capability import Capabilities, suits

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.data.dataset import Dataset
    from compress.models.model import TorchModel
    from compress.tasks.task import Examples, Task
    from compress.utils.progress import Progress


SEARCH, SEARCH_TIMES = "search", "search_times"
"""Keys of a field's metadata that list values for a search: always, or only where latency is limited."""
InputModel = TypeVar("InputModel")
OutputModel = TypeVar("OutputModel")


@dataclass(frozen=True)
class Context:
    """Everything that a stage may use besides the model that it transforms.

    Attributes:
        task: task of the recipe.
        data: splits of the recipe's data.
        max_length: tokens at which an example is truncated.
        seed: seed of every random choice.
        progress: progress bars and messages.
        earlier: loads the output of an earlier stage by a label of `Stage.earlier_outputs`.
        resolve: turns a model reference of the recipe into a local folder.
        scratch: folder for work in progress, which a stage creates when it needs it. The folder survives a killed run,
            and its files were left by the same stage on the same input.
        locate: finds a folder that is not a model (`Stage.references`). Raises `InputError`.
        shared: returns a scratch folder by key, which other stages and runs may write at the same time. Without it,
            these files go to ``scratch``.
        notes: lines that `note` collected for the report.
        tables: tables that `add_table` collected for the report.
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
        """Record a line for the report about a result or a choice of the stage, and show it."""
        self.notes.append(text)
        self.progress.note(text)

    def detail(self, text: str) -> None:
        """Record a line for the report about one layer. The console shows it with `--verbose` only."""
        self.notes.append(text)
        self.progress.detail(text)

    def add_table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Record a table that the report shows with the stage."""
        self.tables.append(StageTable(title=title, columns=tuple(columns), rows=tuple(tuple(row) for row in rows)))

    def encode(self, split: str, model: TorchModel) -> Examples:
        """Return the examples of a split as inputs of ``model``, with label ids if the split is labeled."""
        return self.task.encode(self.data.split(split), model.processor, model.labels(), self.max_length)

    def encode_unlabeled(self, model: TorchModel) -> Examples | None:
        """Return the recipe's unlabeled text as inputs of ``model``, or None if the recipe names none."""
        return None if self.data.unlabeled is None else self.encode_rows(self.data.unlabeled, model)

    def encode_rows(self, rows: pa.Table, model: TorchModel) -> Examples:
        """Return unlabeled rows as inputs of ``model``."""
        return self.task.encode(rows, model.processor, None, self.max_length)

    def validator(self, model: TorchModel) -> Callable[[], float] | None:
        """Return a function that computes the task's first metric on the validation split, or None without one."""
        if "validation" not in self.data.splits:
            return None
        examples = self.encode("validation", model)

        def merit() -> float:
            from compress.tasks.inference import merit

            return merit(self.task, model.module, examples)

        return merit


@dataclass(frozen=True)
class Requirements:
    """Data that a recipe must name before a stage can run.

    Attributes:
        splits: names of the splits that the stage reads.
        unlabeled: whether the stage reads the recipe's unlabeled text.
        labels: whether the splits must have labels.
    """

    splits: tuple[str, ...] = ()
    unlabeled: bool = False
    labels: bool = False


@dataclass(frozen=True)
class OutputSpec:
    """Properties of a stage's output: the integrity check verifies the first group, later stages rely on the second.

    Attributes:
        changes_weights: whether at least one weight differs from the input's.
        max_size_ratio: largest allowed ratio of output bytes to input bytes.
        overhead_bytes: bytes allowed on top: scales, and tensors that are too small to shrink.
        hint: advice for the error message if the output breaks one of these limits.
        integer_graph: whether the output is an ONNX graph with integer weights.
        adapter_beside: whether a LoRA adapter lies beside the weights, not merged into them.
        imatrix_beside: whether an importance matrix of llama.cpp lies beside the weights.
        scales_inputs: whether the inputs of layers were rescaled, so that an adapter trained before no longer fits.
        sparse: whether a share of the weights is zero.
    """

    changes_weights: bool = True
    max_size_ratio: float | None = None
    overhead_bytes: int = 0
    hint: str | None = None
    integer_graph: bool = False
    adapter_beside: bool = False
    imatrix_beside: bool = False
    scales_inputs: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class Reference:
    """A model, an adapter or another folder that a field of a stage names.

    Attributes:
        name: local path or, for a model, also a Hugging Face id or `sample:NAME`.
        kind: what lies there.
        random_weights: whether only the model's config is read, and its weights are initialized at random.
    """

    name: str
    kind: Literal["model", "adapter", "folder"] = "model"
    random_weights: bool = False


@dataclass(frozen=True)
class IntegerWeights:
    """Weights that a stage stores as integers, described for the stages that write them in another format.

    Attributes:
        bits: largest number of bits of a weight.
        group_size: weights of a row that share a scale, -1 for the whole row.
        zero_points: whether groups have zero points.
        group_field: field of the stage that sets the group size.
        zero_points_field: field of the stage that sets the zero points.
        no_zero_points: value of that field for integers without zero points.
    """

    bits: int
    group_size: int
    zero_points: bool
    group_field: str
    zero_points_field: str
    no_zero_points: str


@dataclass(frozen=True)
class AppliesTo:
    """Annotation of a field that has an effect for some tasks only.

    Attributes:
        requires: capabilities that the task must have.
        excludes: capabilities that the task must not have.
    """

    requires: Capabilities = frozenset()
    excludes: Capabilities = frozenset()


class Stage(BaseModel, ABC, Generic[InputModel, OutputModel]):
    """One transformation of a model. Subclasses are frozen and declare `kind: Literal[...]`.

    Example:
        A stage that halves every weight::

            class Halve(Stage[TorchModel, TorchModel]):
                kind: Literal["halve"] = "halve"

                def run(self, model: TorchModel, context: Context) -> TorchModel:
                    for parameter in model.module.parameters():
                        parameter.data /= 2
                    return model
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    """Part of the cache key; raise it when the same parameters give another output than before."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions that every stage of this class calls."""
    requires: ClassVar[Capabilities] = frozenset()
    """Capabilities that a task must have (`compress.tasks.capability`)."""
    excludes: ClassVar[Capabilities] = frozenset()
    """Capabilities that a task must not have."""
    uses_device: ClassVar[bool] = False
    """Whether `run` computes on the recipe's device (`compress.utils.torch_device`)."""
    required_data: ClassVar[Requirements] = Requirements()
    """Data that the recipe must name for every stage of this class."""
    guarantees: ClassVar[OutputSpec] = OutputSpec()
    """Properties of the output of every stage of this class."""
    input_type: ClassVar[type[Any]]
    """Model class that `run` takes: the first type argument of `Stage`."""
    output_type: ClassVar[type[Any]]
    """Model class that `run` returns: the second type argument of `Stage`."""
    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        arguments = cls.__pydantic_generic_metadata__["args"]
        # Only `Stage[InputModel, OutputModel]` itself has type arguments; its subclasses inherit both attributes.
        if len(arguments) == 2:
            cls.input_type, cls.output_type = arguments

    @classmethod
    def supports(cls, task: Capabilities) -> bool:
        """Return whether the stage can be applied to models of a task with these capabilities."""
        return suits(task, cls.requires, cls.excludes)

    def called_packages(self) -> tuple[str, ...]:
        """Return the distributions that this stage calls; their versions are part of the cache key."""
        return self.packages

    def needs(self) -> Requirements:
        """Return the data that the recipe must name: `required_data`, or what the fields of this stage imply."""
        return self.required_data

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return labels of earlier stages (or `start`) whose outputs the stage reads besides its input."""
        return ()

    def references(self) -> Mapping[str, Reference]:
        """Return the fields that name models or local folders, such as `student.model`, with what they name."""
        return {}

    def output_spec(self) -> OutputSpec:
        """Return the properties of the output: `guarantees`, or what the fields of this stage imply."""
        return self.guarantees

    @abstractmethod
    def run(self, model: InputModel, context: Context) -> OutputModel:
        """Return the transformed model; ``model`` may be changed in place. Raises `StageError`."""


AnyStage = Stage[Any, Any]
"""A stage whatever its input and output."""


def all_references(stages: Iterable[AnyStage]) -> list[Reference]:
    """Return everything that the fields of the stages name, in their order."""
    return [reference for stage in stages for reference in stage.references().values()]
