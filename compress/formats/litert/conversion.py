"""A torch model as a LiteRT file: one graph for each fixed length, which share the weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.formats.litert.model import LITERT_FILE
from compress.formats.litert.names import named_after
from compress.formats.silence import silence
from compress.formats.tracing import lean_tracing, unmasked
from compress.models.vocabulary import token_embedding
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError, first_line

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel

ANY_SIZE = "serving_default"
"""LiteRT's own name for the only signature of a model whose inputs have one size, as images do."""


def to_litert(model: TorchModel, examples: Examples, lengths: tuple[int, ...]) -> bytes:
    """The content of a `.tflite` file in fp32, the same bytes each time, for one row of a batch at a time.

    For each of ``lengths`` it has a signature `length_N`; without any, `serving_default` takes inputs of the shape that
    ``examples`` have. Integers are int32; the output is the answer of the task. Raises `StageError`.
    """
    row = _OneRow(model.module.eval(), examples)
    with _quiet() as litert_torch, lean_tracing(), row.looking_up(), unmasked(model.module), torch.no_grad():
        converter = litert_torch.Converter()
        for length in lengths or (None,):
            name = ANY_SIZE if length is None else f"length_{length}"
            converter.add_signature(name, row, sample_kwargs=_sample(examples, length))
        try:
            content = _content(converter.convert())
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
            raise StageError(
                f"The model cannot be converted for LiteRT: {first_line(error)}",
                expected="operators that litert-torch knows",
                hint="leave this target out, or export to another format",
            ) from error
    return named_after(content, {name: value.numpy() for name, value in model.tensors().items()})


class _OneRow(nn.Module):
    """Module that computes the answer of one row from the row's inputs."""

    def __init__(self, module: nn.Module, examples: Examples) -> None:
        super().__init__()
        self.module = module
        self._examples = examples
        self._nothing: dict[str, torch.Tensor] = {}

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits or the embedding of one row."""
        first = next(iter(inputs.values()))
        self._nothing["zero"] = (first[:, :1] < 0).to(first.dtype)
        return {self._examples.answer: answers(self._examples, self.module(**inputs), inputs)}

    @contextlib.contextmanager
    def looking_up(self) -> Iterator[None]:
        """Have tables of positions and the like be looked up.

        Their ids are constants, so the converter would store what they give, in fp32, once for each length. A zero that
        comes from the input is added: what is stored is the table, once.
        """
        words = token_embedding(self.module) if self._reads_ids() else None
        tables = [one for one in self.module.modules() if isinstance(one, nn.Embedding) and one is not words]
        hooks = [table.register_forward_pre_hook(self._moved) for table in tables if self._reads_ids()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _moved(self, table: nn.Module, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (ids[0] + self._nothing["zero"], *ids[1:])

    def _reads_ids(self) -> bool:
        return "input_ids" in self._examples.padding


def _sample(examples: Examples, length: int | None) -> dict[str, torch.Tensor]:
    """Return an example with int32 integers, cut or repeated to ``length``, its last token masked."""
    names = list(examples.padding)
    example_inputs = {name: value for name, value in tensors(examples, [0]).items() if name in names}
    if length is not None:
        example_inputs = {
            name: value.repeat(1, -(-length // value.shape[1]))[:, :length] for name, value in example_inputs.items()
        }
    narrow = {
        name: value if value.is_floating_point() else value.to(torch.int32) for name, value in example_inputs.items()
    }
    if length is not None and length > 1 and "attention_mask" in narrow:
        narrow["attention_mask"][:, -1] = 0
    return narrow


def _content(made: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made.export(str(Path(folder) / LITERT_FILE))
        return (Path(folder) / LITERT_FILE).read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """litert-torch without its steps on the terminal and without what its parts say as they are imported."""
    # Read once, as its converter is loaded; the second has it say nothing of kernels that nothing here calls.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with silence("prints"):
        import litert_torch

        shown, litert_torch.config.show_progress = litert_torch.config.show_progress, False
        try:
            yield litert_torch
        finally:
            litert_torch.config.show_progress = shown


def words_of(model: TorchModel) -> str | None:
    """Return the name of the word embedding parameter; None for a model that reads no ids."""
    table = token_embedding(model.module)
    if table is None:
        return None
    name: str = next(name for name, value in model.module.named_parameters() if value is table.weight)
    return name
