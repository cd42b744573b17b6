"""A torch model as a LiteRT file: one graph for each fixed length, which share the weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.formats.litert.model import LITERT_FILE, Blocks, Precision
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import lean_tracing, without_padding_masks
from compress.models.vocabulary import token_embedding
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError, first_line

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel


LOOKED_UP = ".looked_up"
"""Ends the name of what a look-up gives, which begins with its table's: quantization recipes name operators so."""

_LOOK_UP = "EMBEDDING_LOOKUP"


def named_after(content: bytes, parameters: Mapping[str, np.ndarray]) -> bytes:
    """The same file, shorter: a stored tensor gets the name of the parameter whose values it has, perhaps transposed.

    Others, and what operators give, are numbered. Names are unique in the file; those of signatures stay.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    known = _by_values(parameters)
    for place, graph in enumerate(model.subgraphs):
        end = f"@{place}" if place else ""
        names = [_name(model, tensor, index, known) for index, tensor in enumerate(graph.tensors)]
        for operator in graph.operators:
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) == "EMBEDDING_LOOKUP":
                names[operator.outputs[0]] = f"{names[operator.inputs[1]]}{LOOKED_UP}"
        for tensor, name in zip(graph.tensors, names, strict=True):
            tensor.name = f"{name}{end}"
    _tell_apart([tensor for graph in model.subgraphs for tensor in graph.tensors])
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _name(model: Any, tensor: Any, index: int, known: Mapping[str, str]) -> str:
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return f"value_{index}"
    return known.get(_digest(np.asarray(data)), f"constant_{index}")


def _by_values(parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, values in parameters.items():
        for one in (values, values.T):
            names.setdefault(_digest(np.frombuffer(np.ascontiguousarray(one).tobytes(), np.uint8)), name)
    return names


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


def _tell_apart(tensors: list[Any]) -> None:
    """Number tensors that share a name with another tensor."""
    seen: Counter[str] = Counter()
    for tensor in tensors:
        name = tensor.name
        seen[name] += 1
        if seen[name] > 1:
            tensor.name = f"{name}#{seen[name]}"


ANY_SIZE = "serving_default"
"""LiteRT's own name for the only signature of a model whose inputs have one size, as images do."""


def to_litert(model: TorchModel, examples: Examples, lengths: tuple[int, ...]) -> bytes:
    """The content of a `.tflite` file in fp32, the same bytes each time, for one row of a batch at a time.

    For each of ``lengths`` it has a signature `length_N`; without any, `serving_default` takes inputs of the shape that
    ``examples`` have. Integers are int32; the output is the answer of the task. Raises `StageError`.
    """
    row = _OneRow(model.module.eval(), examples)
    with (
        _quiet() as litert_torch,
        lean_tracing(),
        row.looking_up(),
        without_padding_masks(model.module),
        torch.no_grad(),
    ):
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
    with suppress_output("prints"):
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


def quantize_litert(
    content: bytes, precision: Precision, table: str | None, embedding_bits: int | None, block: Blocks | None
) -> bytes:
    """The same file with its weights in ``precision``; the same bytes each time. Raises `StageError`.

    ``int8``: weights with a scale for each channel, and inputs of products rounded in each call, row by row;
    ``int8_weights``: the same weights, made float again where they are used. Tables have 8 bits and a scale a row.
    ``embedding_bits``, 4 or 8, is for the ``table`` of words alone: 4 bits with a scale for each ``block`` of a row, a
    divisor of its length, or for the whole row.
    """
    from ai_edge_quantizer import quantizer

    if precision == "fp32" and embedding_bits is None:
        return content
    recipe = _recipe(precision, table, embedding_bits, block)
    try:
        with suppress_output("prints"):  # it has a bar that nothing turns off
            quantized = quantizer.Quantizer(content, recipe).quantize(
                enable_progress_bar=False, enable_progress_report=False
            )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise StageError(
            f"The model cannot be quantized for LiteRT: {error}", hint="set precision: fp32, or leave this target out"
        ) from error
    return bytes(quantized.quantized_model)


def _recipe(precision: Precision, table: str | None, bits: int | None, block: Blocks | None) -> list[dict[str, Any]]:
    """Return the recipe for ai-edge-quantizer; of two entries for an operator the later one applies."""
    from ai_edge_quantizer import algorithm_manager, qtyping, recipe_manager

    manager = recipe_manager.RecipeManager()
    every, look_up = qtyping.TFLOperationName.ALL_SUPPORTED, qtyping.TFLOperationName(_LOOK_UP)
    names = algorithm_manager.AlgorithmName
    if precision == "fp16":
        manager.add_weight_only_config(".*", every, 16, algorithm_key=names.FLOAT_CASTING)
    elif precision == "int8":
        manager.add_dynamic_config(".*", every, 8)
    elif precision == "int8_weights":
        manager.add_weight_only_config(".*", every, 8)
        # A table is looked up in its integers either way.
        manager.add_dynamic_config(f"{re.escape(LOOKED_UP)}", look_up, 8)
    if table is not None and bits is not None:
        granularity = qtyping.QuantGranularity
        by = granularity(f"BLOCKWISE_{block}") if bits == 4 and block else granularity.CHANNELWISE
        manager.add_dynamic_config(f"{re.escape(table + LOOKED_UP)}", look_up, bits, by)
    entries: list[dict[str, Any]] = manager.get_quantization_recipe()
    return entries
