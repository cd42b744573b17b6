"""Interface of a task: its columns, model loading, input encoding, loss and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, overload

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import Capabilities
from compress.tasks.lazy_modules import losses, np, pa, torch
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation


NamedArrays: TypeAlias = "Mapping[str, np.ndarray]"
"""Arrays by name: inputs of a model, its outputs, or the parts of them that metrics need."""
CollectedOutputs: TypeAlias = NamedArrays
"""Parts of a model's outputs that the metrics need, by name. The first axis is the example."""


class OnDemand(Sequence[NamedArrays]):
    """Sequence of examples that are computed on access."""

    @abstractmethod
    def some(self, which: slice) -> Sequence[NamedArrays]:
        """Return the examples of a slice, in its order."""

    @overload
    def __getitem__(self, index: int) -> NamedArrays: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NamedArrays]: ...
    def __getitem__(self, index: int | slice) -> NamedArrays | Sequence[NamedArrays]:
        if isinstance(index, slice):
            return self.some(index)
        position = range(len(self))[index]
        return self.some(slice(position, position + 1))[0]


class Joined(OnDemand):
    """Examples with additional inputs for each."""

    def __init__(self, inputs: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]]) -> None:
        self._inputs, self._more = inputs, more

    def __len__(self) -> int:
        return len(self._inputs)

    def some(self, which: slice) -> Sequence[NamedArrays]:
        """Return the merged inputs of a slice."""
        return [{**more, **example} for more, example in zip(self._more[which], self._inputs[which], strict=True)]

    def more(self, index: int) -> NamedArrays:
        """Return the additional inputs of an example without computing the others."""
        return self._more[index]


class Chained(OnDemand):
    """Concatenation of two sequences of examples."""

    def __init__(self, first: Sequence[NamedArrays], second: Sequence[NamedArrays]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def some(self, which: slice) -> Sequence[NamedArrays]:
        """Return the examples of a slice from either sequence."""
        count = len(self._first)
        positions = range(*which.indices(len(self)))
        return [self._first[position] if position < count else self._second[position - count] for position in positions]


LOGITS, LAST_HIDDEN_STATE, SENTENCE_EMBEDDING = "logits", "last_hidden_state", "sentence_embedding"
"""Names of graph outputs in transformers and sentence-transformers."""


class Head(Protocol):
    """Postprocessing of a model's outputs into answers, by default its logits unchanged.

    Attributes:
        outputs: Names of the outputs that it reads.
        answer: Name of an output that already holds the answers.
        answer_label: Noun for the answers in messages.
    """

    outputs: ClassVar[tuple[str, ...]] = (LOGITS,)
    answer: ClassVar[str] = LOGITS
    answer_label: ClassVar[str] = "logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the answers [B, ...] of a batch. Answers of padding are 0, so that a longer batch only adds zeros."""
        return outputs[LOGITS]


@dataclass(frozen=True)
class Examples:
    """Encoded examples, without padding and without a batch axis.

    Attributes:
        inputs: One mapping per example: name -> array of any dtype and shape, such as `input_ids` [length] int64,
            `pixel_values` [channels, height, width] float32 or `input_features` [bins, frames] float32. All arrays of
            one input have the same dtype and number of axes. The sequence may compute its arrays lazily if they do
            not fit in memory; then ``sizes`` is set.
        padding: Model input -> value that fills smaller examples at the end of each axis, or None if the input may not
            be padded because the model would treat the padding as content.
        labels: Class ids [n, ...] int64 or other reference values of the task, or None.
        batches: Input -> axis of its examples along which a model accepts any number, independent of other inputs.
        num_scored_tokens: Number of tokens at the end of each example that count, if not all do.
        note: Remark about how the examples were made, for the report.
        sizes: Lengths of the examples [n], if ``inputs`` is lazy.
        head: Computes the answers from the outputs. Without it the logits are the answers.
        seconds: Duration of each recording, [n].
        black_pixel: Value of a black pixel after preprocessing, [channels].
        axis_bounds: Smallest and largest size of a paddable axis that the model's config does not limit.
        unbatchable: True if the model treats padding as content, so that each example needs its own call.
        full_call: True if each example is a complete call, including the batch axis, of a graph without a task.
        extra_outputs: Outputs that clients request from a graph but that no answer needs.
    """

    inputs: Sequence[NamedArrays]
    padding: Mapping[str, float | None]
    labels: np.ndarray | None = None
    batches: Mapping[str, str] = field(default_factory=dict)
    num_scored_tokens: int | None = None
    note: str = ""
    sizes: np.ndarray | None = None
    head: Head | None = None
    seconds: np.ndarray | None = None
    black_pixel: np.ndarray | None = None
    axis_bounds: tuple[int, int] | None = None
    unbatchable: bool = False
    full_call: bool = False
    extra_outputs: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, rows: Iterable[int]) -> Examples:
        """Return the examples at ``rows``, in that order."""
        indices = np.fromiter(rows, dtype=np.int64)
        labels, sizes, seconds = (
            None if values is None else values[indices] for values in (self.labels, self.sizes, self.seconds)
        )
        inputs = [self.inputs[int(index)] for index in indices]
        return replace(self, inputs=inputs, labels=labels, sizes=sizes, seconds=seconds)

    def lengths(self) -> np.ndarray:
        """Return the last axis of each example's first input, [n]: tokens, frames, or the width of an image.

        Examples of similar length share a batch, and are timed apart from longer ones.
        """
        if self.sizes is not None:
            return self.sizes
        return np.array([next(iter(example.values())).shape[-1] for example in self.inputs])

    @property
    def unpaddable_input(self) -> str | None:
        """Return an input with varying shapes that may not be padded, so that some examples cannot share a batch."""
        unpadded = (name for name, fill in self.padding.items() if fill is None)
        return next((name for name in unpadded if len({example[name].shape for example in self.inputs}) > 1), None)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the examples at ``indices``: name -> [len(indices), ...], padded to the largest.

        Raises `DataError` if inputs that may not be padded differ in shape.
        """
        chosen = [self.inputs[i] for i in indices]
        if self.full_call:
            if len(chosen) != 1:
                raise DataError("Calls of a graph of no task are made one by one.", expected="a batch size of 1")
            return dict(chosen[0])
        return {name: _stack(name, [example[name] for example in chosen], fill) for name, fill in self.padding.items()}

    @property
    def classes(self) -> np.ndarray | None:
        """Return the labels [n] if they are class ids, else None."""
        if self.head is not None or self.labels is None or self.labels.dtype.kind not in "iu":
            return None
        return self.labels if self.labels.ndim == 1 else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the model outputs that the answers are computed from."""
        return () if self.full_call else (LOGITS,) if self.head is None else self.head.outputs

    @property
    def answer(self) -> str:
        """Return the name of the output that holds the answers."""
        return "outputs" if self.full_call else LOGITS if self.head is None else self.head.answer

    @property
    def answer_label(self) -> str:
        """Return the noun for the answers in messages."""
        return "outputs" if self.full_call else "logits" if self.head is None else self.head.answer_label

    def answers(self, outputs: NamedArrays, batch: NamedArrays) -> np.ndarray:
        """Return the answers [B, ...] of a batch, from a graph's outputs and ``head``."""
        if self.full_call:
            # All numbers of all outputs, [1, numbers].
            numbers = [array.astype(np.float32).reshape(-1) for array in outputs.values() if array.dtype.kind in "fiub"]
            return np.concatenate(numbers)[np.newaxis]
        if self.head is None or (self.answer in outputs and self.answer not in self.outputs):
            return outputs[self.answer]

        tensors = {name: torch.from_numpy(outputs[name]) for name in self.outputs}
        return self.head.read(tensors, {name: torch.from_numpy(array) for name, array in batch.items()}).numpy()

    def aligned(self, candidates: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return answers [B, ...] in the order of ``expected``, if ``head`` defines an alignment, as for objects."""
        align = getattr(self.head, "aligned", None)
        return candidates if align is None else align(candidates, expected)

    def with_unlabeled(self, more: Examples) -> Examples:
        """Return the examples followed by ``more``, whose labels are -100 (none)."""
        assert self.labels is not None, "asked for by who learns from labels"
        none = np.full((len(more), *self.labels.shape[1:]), -100, self.labels.dtype)
        labels = np.concatenate([self.labels, none])
        return replace(self, inputs=[*self.inputs, *more.inputs], labels=labels)


def _stack(name: str, arrays: Sequence[np.ndarray], fill: float | None) -> np.ndarray:
    shapes = {array.shape for array in arrays}
    if len(shapes) == 1:
        return np.stack(arrays)
    if fill is None:
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise DataError(
            f"The examples' {name} differ in shape: {shown}.",
            expected="one shape for all, since padding would be taken for content",
            hint="have the processor bring them to one size, e.g. do_resize with a fixed size for images",
        )
    largest = np.max([array.shape for array in arrays], axis=0)
    stacked = np.full((len(arrays), *largest), fill, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[row][tuple(slice(size) for size in array.shape)] = array
    return stacked


class Task(Protocol):
    """One Hugging Face task. Its file defines an object `TASK`, which `registry` finds.

    A task of another package is an object named by an entry point of the group `compress.tasks`. Importing the file
    imports neither torch nor numpy: methods import them, or use those of `compress.tasks.lazy_modules`.
    """

    name: str
    columns: tuple[Column, ...]
    capabilities: Capabilities
    """Properties by which stages, apps and runtimes select tasks (`compress.tasks.capability`)."""
    architectures: tuple[str, ...] = ()
    """Suffixes of the transformers class names of this task, as in `architectures` of config.json."""
    app_steps: tuple[str, str] | None = None
    """Preprocessing and postprocessing of an app, or None if no app can be built."""
    starter: Mapping[str, Any] = MappingProxyType({})
    """Recipe fields of the starter recipe, or empty if there is none."""
    slices: tuple[Slice, ...] = ()
    """Default slices of the test data."""
    batch_size: int = 32
    """Number of examples that are evaluated at once."""
    data: Mapping[str, Any] = MappingProxyType({})
    """Default of a recipe's `data` section, or empty if the recipe must have one."""
    packages: tuple[str, ...] = ()
    """Distributions that the models call besides torch and transformers. Their versions are part of cache keys."""
    metrics: tuple[str, ...] = ()
    """Metrics that `measure` and `compare` return, as `compress.results.metrics` names their rows; limits on metrics of
    other tasks are refused. Empty if unknown, as for tasks of other packages."""
    ratios: tuple[str, ...] = ()
    """Metrics that are not means of per-example outcomes, so that they are computed anew for each slice."""

    @abstractmethod
    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor. A missing head is created for ``labels``. Raises `ModelError`."""

    @abstractmethod
    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Convert rows to model inputs.

        Args:
            rows: Rows with columns named as in `columns`; label columns are optional.
            processor: Tokenizer, image processor or feature extractor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.

        Raises:
            DataError: If a row cannot be encoded.
        """

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return the inputs that a model is evaluated on. By default these are all rows.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.

        Raises:
            DataError: If no row can be evaluated.
        """
        return self.encode(rows, processor, labels, max_length)

    def eval_examples_like(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
        baseline: Callable[[], Any],
    ) -> Examples:
        """Return `eval_examples` of a model that is compared with a baseline.

        If the processor decides where an example begins and ends, the examples are those of the baseline's processor.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
            baseline: Loads the baseline's processor.
        """
        return self.eval_examples(rows, processor, labels, max_length, evaluation)

    def members(self, rows: pa.Table, chosen: np.ndarray, examples: Examples) -> np.ndarray:
        """Return which examples [n] belong to a slice of ``chosen`` rows [rows]. By default example i is row i."""
        return chosen

    def token_categories(self, rows: pa.Table, processor: Processor, examples: Examples, language: str) -> NamedArrays:
        """Return for each category of a language's tokens which scored tokens belong to it: category -> [n, scored].

        Empty for languages without categories, such as prose.

        Args:
            rows: Rows of the split.
            processor: Tokenizer of the model.
            examples: The examples made of the rows.
            language: "text" or "python".

        Raises:
            DataError: If a text is not valid in the language.
        """
        return {}

    @abstractmethod
    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the scalar training loss of a batch."""

    def targets(self, labels: torch.Tensor) -> Mapping[str, Any]:
        """Return the inputs that a model needs to compute its loss itself, or nothing."""
        return {}

    def matches_config(self, config: Mapping[str, Any]) -> bool:
        """Return whether a model's config.json names this task by something other than its class."""
        return False

    def variants(self) -> tuple[Task, ...]:
        """Return the task objects for models with different kinds of answers. They share the name and the columns."""
        return (self,)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """Return the variant for a model, by its config.json."""
        return self

    def distance(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return a differentiable scalar distance between a student's answers [B, ...] and its teacher's."""
        return losses.softened_kl(student, teacher, temperature)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the model's own predictions for a batch as labels, for rows without labels."""
        predicted: torch.Tensor = outputs.logits.detach().argmax(dim=-1)
        return predicted

    @abstractmethod
    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return what the metrics need of a batch's outputs; ``indices`` are its examples. Raises `ModelError`."""

    @abstractmethod
    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return the task's metrics with 95% intervals and raw outcomes per example.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.

        Raises:
            ModelError: If outputs are not finite.
        """

    @abstractmethod
    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return how similar a model's answers are to the baseline's on the same examples.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """

    def probabilities(self, collected: NamedArrays) -> np.ndarray | None:
        """Return class probabilities, [n, classes], or None if answers are no classes. Raises `ModelError`."""
        return None

    @property
    def raw_columns(self) -> tuple[Column, ...]:
        """Return the columns of a raw input, which a user gives to a model. The others hold expected outputs."""
        return tuple(column for column in self.columns if column.is_input and not column.optional)

    def input_names(self, processor: Processor) -> tuple[str, ...]:
        """Return the names of the values of one raw input, such as `question` and `context`.

        Args:
            processor: Processor of the model.
        """
        return tuple(column.name for column in self.raw_columns)

    def raw_examples(
        self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int
    ) -> Examples:
        """Return the model inputs of raw inputs, which have no expected outputs. See `encode`.

        Args:
            rows: Rows with the `raw_columns`.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
            max_length: Number of tokens after which texts are truncated.
        """
        return self.encode(rows, processor, labels, max_length)

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the prediction for each row in the form of transformers' pipelines; by default the answers unchanged.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        return list(answers)


def starter_recipe(
    name: str,
    description: str,
    model: str,
    data: Mapping[str, object],
    stages: Mapping[str, Mapping[str, object]],
    limit: Mapping[str, object],
    **sections: object,
) -> dict[str, Any]:
    """Return the fields of a task's starter recipe, whose models are measured on this machine's CPU.

    Args:
        name: Name of the recipe.
        description: Description of its result.
        model: Reference of the starting model.
        data: The `data` section, or empty for the task's default.
        stages: Parameters of each stage by its name, in the order of the run.
        limit: Limit of the most important metric.
        **sections: Further fields of the recipe.
    """
    recipe = {
        "name": name,
        "description": description,
        "model": model,
        "data": data,
        "stages": [{stage: parameters} for stage, parameters in stages.items()],
        "targets": ["cpu"],
        "benchmark": {},
        "limits": [limit],
        **sections,
    }
    return recipe if data else {field: value for field, value in recipe.items() if field != "data"}


def split_files(suffix: str, columns: Mapping[str, str], **settings: object) -> dict[str, object]:
    """Return a starter's `data` section: one file for each split, the columns of the files, and further settings."""
    splits = {split: f"{split}.{suffix}" for split in ("train", "validation", "test")}
    return {"splits": splits, "columns": columns, **settings}


def split_folders(folder: str) -> dict[str, object]:
    """Return a starter's `data` section with a subfolder of ``folder`` for each split."""
    return {"splits": {split: f"{folder}/{split}" for split in ("train", "validation", "test")}}


def distill_finetuned(epochs: int) -> dict[str, dict[str, object]]:
    """Return a starter's stage that trains a student with half of the layers of a base model."""
    return {"distill": {"teacher": "finetune", "student": {"layers": [0, 2, 4]}, "epochs": epochs}}


def relative_limit(metric: str, share: float) -> dict[str, object]:
    """Return a starter's limit: the least ``share`` of the baseline's value that a metric may have."""
    return {"metric": metric, "at_least": share, "of": "baseline"}
