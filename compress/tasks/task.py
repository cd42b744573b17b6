"""What a task knows: its columns, how it loads a model, how examples become inputs, the loss and the metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.tasks.capability import Capabilities
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement
    from compress.tasks.evaluation import Evaluation


LOGITS, LAST_HIDDEN_STATE, SENTENCE_EMBEDDING = "logits", "last_hidden_state", "sentence_embedding"
"""Outputs of graphs, by the names that transformers and sentence-transformers know."""


class Head(Protocol):
    """What makes the answers of a model's outputs, where they are not its logits as they stand.

    ``outputs`` are the names of those it reads, ``answer`` what an output is called that holds what it makes of them,
    ``many`` what the answers are, in a word for people.
    """

    outputs: ClassVar[tuple[str, ...]]
    answer: ClassVar[str]
    many: ClassVar[str]

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The answers [B, ...] to a batch; those of padding are 0, so that a longer batch gives the same and zeros."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples, unpadded and without a batch axis.

    ``inputs[i][name]`` is an array of any dtype and shape: `input_ids` [length] int64, `pixel_values` [channels,
    height, width] float32, `input_features` [bins, frames] float32. Of one input all arrays have the same dtype and
    number of axes. ``inputs`` may make its arrays when they are asked for, where all of them would not fit in memory;
    then ``sizes`` is given.

    ``padding`` has every input that the model takes, and the value that fills a smaller example at the end of each
    axis; None for an input that may not be padded, since a model would take what fills it for content.

    ``head`` makes the answers of a model's outputs; without one its logits are its answers.

    ``batches`` names the axis of an input's examples where a model may be given as many as it likes of that one alone.

    ``labels`` are [n, ...], class ids in int64 or whatever the task measures against, or None. ``scored`` is how
    many tokens at the end of each example count, where not all of them do; ``note`` what a reader must know of how
    the examples were made. ``seconds`` is how long each recording lasts, [n]; ``black`` what a black pixel of an image
    has become, [channels]. ``whole``: each example is a call by itself, batch axis and all, of a graph all of whose
    outputs are answers. ``free`` are the shortest and the longest that an axis which may be padded can be, where no
    model's config says it: samples of a recording. ``alone`` says that a model takes what fills a shorter example for
    content, so that each is answered by itself. ``beside`` names outputs that no answer is made of, but that
    clients ask a graph for.
    """

    inputs: Sequence[Mapping[str, np.ndarray]]
    padding: Mapping[str, float | None]
    labels: np.ndarray | None = None
    batches: Mapping[str, str] = field(default_factory=dict)
    scored: int | None = None
    note: str = ""
    sizes: np.ndarray | None = None
    head: Head | None = None
    seconds: np.ndarray | None = None
    black: np.ndarray | None = None
    free: tuple[int, int] | None = None
    alone: bool = False
    whole: bool = False
    beside: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, rows: Iterable[int]) -> Examples:
        """Those at ``rows``, in that order."""
        import numpy as np

        places = np.fromiter(rows, dtype=np.int64)
        labels, sizes, seconds = (
            None if values is None else values[places] for values in (self.labels, self.sizes, self.seconds)
        )
        inputs = [self.inputs[int(place)] for place in places]
        return replace(self, inputs=inputs, labels=labels, sizes=sizes, seconds=seconds)

    def lengths(self) -> np.ndarray:
        """The last axis of each example's first input, [n]: tokens, frames, or the width of an image.

        What is alike in length is batched together, and timed apart from what is longer.
        """
        import numpy as np

        if self.sizes is not None:
            return self.sizes
        return np.array([next(iter(example.values())).shape[-1] for example in self.inputs])

    @property
    def unlike(self) -> str | None:
        """An input whose shapes differ, and that may not be padded, so that some examples can share no batch."""
        unpadded = (name for name, fill in self.padding.items() if fill is None)
        return next((name for name in unpadded if len({one[name].shape for one in self.inputs}) > 1), None)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at ``indices``: name -> [len(indices), ...], padded to the largest where they differ.

        Raises `DataError` where inputs differ in shape that may not be padded.
        """
        chosen = [self.inputs[i] for i in indices]
        if self.whole:
            if len(chosen) != 1:
                raise DataError("Calls of a graph of no task are made one by one.", expected="a batch size of 1")
            return dict(chosen[0])
        return {name: _stack(name, [example[name] for example in chosen], fill) for name, fill in self.padding.items()}

    @property
    def classes(self) -> np.ndarray | None:
        """The labels [n] where they are ids of classes, and not what else a task measures against."""
        if self.head is not None or self.labels is None or self.labels.dtype.kind not in "iu":
            return None
        return self.labels if self.labels.ndim == 1 else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a model's outputs that its answers are made of."""
        return () if self.whole else (LOGITS,) if self.head is None else self.head.outputs

    @property
    def answer(self) -> str:
        """What an output is called that holds the answers as they are."""
        return "outputs" if self.whole else LOGITS if self.head is None else self.head.answer

    @property
    def answers_are(self) -> str:
        """What the answers are, in a word for people."""
        return "outputs" if self.whole else "logits" if self.head is None else self.head.many

    def answers(self, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The answers [B, ...] that a graph gives for a batch, or that ``head`` makes of its outputs."""
        if self.whole:
            return _all_outputs(outputs)
        if self.head is None or (self.answer in outputs and self.answer not in self.outputs):
            return outputs[self.answer]
        import torch

        found = {name: torch.from_numpy(outputs[name]) for name in self.outputs}
        return self.head.read(found, {name: torch.from_numpy(array) for name, array in batch.items()}).numpy()

    def aligned(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Answers [B, ...] in the order of those ``expected``, where they have none of their own: ``head`` says so."""
        align = getattr(self.head, "aligned", None)
        return found if align is None else align(found, expected)

    def with_unlabeled(self, more: Examples) -> Examples:
        """With more examples behind them, whose labels are -100: they have none."""
        import numpy as np

        assert self.labels is not None, "asked for by who learns from labels"
        none = np.full((len(more), *self.labels.shape[1:]), -100, self.labels.dtype)
        labels = np.concatenate([self.labels, none])
        return replace(self, inputs=[*self.inputs, *more.inputs], labels=labels)


def _all_outputs(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Every number of every output of a call, [1, numbers]."""
    import numpy as np

    numbers = [array.astype(np.float32).reshape(-1) for array in outputs.values() if array.dtype.kind in "fiub"]
    return np.concatenate(numbers)[np.newaxis]


def _stack(name: str, arrays: Sequence[np.ndarray], fill: float | None) -> np.ndarray:
    import numpy as np

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


Kept: TypeAlias = "Mapping[str, np.ndarray]"
"""What is kept of a model's outputs, by name; the first axis is that of the examples."""


class Task(Protocol):
    """One Hugging Face task: one file, whose object `TASK` says everything about it and is found by `registry`.

    Of another package it is an object that an entry point of the group `compress.tasks` names. Importing the file
    imports neither torch nor numpy: both wait for a method that needs them.
    """

    name: str
    columns: tuple[Column, ...]
    capabilities: Capabilities
    """What stages, apps and runtimes choose their tasks by (`compress.tasks.capability`)."""
    architectures: tuple[str, ...] = ()
    """Endings of the names of transformers' classes that are for this task, as a model's config.json has them."""
    app_steps: tuple[str, str] | None = None
    """What an app does before the model and behind it (`bundle.steps`, `bundle.ends`); `None` where no app is made."""
    starter: Mapping[str, Any] = MappingProxyType({})
    """Fields of a recipe to begin with, stages among them, the rest at its default; without any there is no starter."""
    slices: tuple[Slice, ...] = ()
    """The parts of the test data that are looked at where the recipe names none."""
    batch_size: int = 32
    """Examples that are evaluated at once."""
    data: Mapping[str, Any] = MappingProxyType({})
    """What a recipe has for `data` where it names none; without any it has to."""
    packages: tuple[str, ...] = ()
    """Distributions that its models call, beside torch and transformers; their versions are part of cache keys."""
    ratios: tuple[str, ...] = ()
    """Metrics that are no means of outcomes of 0 and 1, and are measured anew on each slice; `Kept` is by row then."""

    @abstractmethod
    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor; a missing head is created for ``labels``. Raises `ModelError`."""

    @abstractmethod
    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Turn rows (columns named as in `columns`; label columns optional) into inputs. Raises `DataError`."""

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """The inputs that a model is judged by: every row, unless a task has more to say.

        Raises `DataError` for rows that leave nothing to judge by.
        """
        return self.encode(rows, processor, labels, max_length)

    def held_out_beside(
        self,
        rows: pa.Table,
        processor: Any,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
        baseline: Callable[[], Any],
    ) -> Examples:
        """`held_out` of a model that is compared with one whose processor ``baseline`` loads.

        Where a processor decides what an example is, these are the baseline's.
        """
        return self.held_out(rows, processor, labels, max_length, evaluation)

    def members(self, rows: pa.Table, chosen: np.ndarray, examples: Examples) -> np.ndarray:
        """Which examples [n] make a slice of the ``chosen`` rows [rows]: by default example i is row i."""
        return chosen

    def kinds_of_tokens(
        self, rows: pa.Table, processor: Any, examples: Examples, language: str
    ) -> Mapping[str, np.ndarray]:
        """Which of what `keep` has of every token are of a kind that ``language`` knows: kind -> [n, scored].

        Nothing where that isn't known, as of prose. Raises `DataError` for text that is not of the language.
        """
        return {}

    @abstractmethod
    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Scalar training loss of a batch."""

    def targets(self, labels: torch.Tensor) -> Mapping[str, Any]:
        """What a model that computes its loss by itself is given beside its inputs to do so; else nothing."""
        return {}

    def told_by(self, config: Mapping[str, Any]) -> bool:
        """Whether a model's config.json says that it is for this task in other words than by its class."""
        return False

    def kinds(self) -> tuple[Task, ...]:
        """The task for each kind of models that answer in a way of their own; itself alone where all are alike.

        They share its name and its columns.
        """
        return (self,)

    def of(self, config: Mapping[str, Any]) -> Task:
        """That one of `kinds` which a model is for, by its config.json."""
        return self

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """How far the answers [B, ...] of a model are from those that it is taught; a scalar to train on."""
        from compress.numerics.distillation import softened_kl

        return softened_kl(mine, taught, temperature)

    def own_labels(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the model itself would have for labels of a batch, for rows that have none."""
        chosen: torch.Tensor = outputs.logits.detach().argmax(dim=-1)
        return chosen

    @abstractmethod
    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """What of a batch's outputs the metrics need; ``indices`` are its examples'. Raises `ModelError`."""

    @abstractmethod
    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """The task's metrics with 95% intervals and raw outcomes of each example. Raises `ModelError`."""

    @abstractmethod
    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """How near a model's answers are to those of ``reference``, the baseline, on the same examples."""

    @abstractmethod
    def probabilities(self, kept: Kept) -> np.ndarray | None:
        """Of each answer that could be given, [n, answers]; None where answers are no classes. Raises `ModelError`."""
