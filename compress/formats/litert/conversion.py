"""Conversion of a torch model to a LiteRT file with one graph per fixed length, and quantization of its weights."""

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
    from compress.models.model import TorchModel


LOOKUP_SUFFIX = ".looked_up"
"""Suffix of the output of an embedding lookup, after the table's name, so that quantization recipes can select it."""

_LOOK_UP = "EMBEDDING_LOOKUP"


def rename_tensors(content: bytes, parameters: Mapping[str, np.ndarray]) -> bytes:
    """Return the same file with short, unique names; the names of signatures stay.

    A stored tensor gets the name of the parameter with the same values, possibly transposed. Other tensors are
    numbered.
    The converter's own names contain every scope that it visited.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    parameter_names = _parameter_names(parameters)
    for number, graph in enumerate(model.subgraphs):
        suffix = f"@{number}" if number else ""
        names = [_name(model, tensor, index, parameter_names) for index, tensor in enumerate(graph.tensors)]
        for operator in graph.operators:
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) == "EMBEDDING_LOOKUP":
                names[operator.outputs[0]] = f"{names[operator.inputs[1]]}{LOOKUP_SUFFIX}"
        for tensor, name in zip(graph.tensors, names, strict=True):
            tensor.name = f"{name}{suffix}"
    _number_duplicates([tensor for graph in model.subgraphs for tensor in graph.tensors])
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _name(model: Any, tensor: Any, index: int, parameter_names: Mapping[str, str]) -> str:
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return f"value_{index}"
    return parameter_names.get(_digest(np.asarray(data)), f"constant_{index}")


def _parameter_names(parameters: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return parameter names by the digests of their values, including transposed ones."""
    names: dict[str, str] = {}
    for name, values in parameters.items():
        for array in (values, values.T):
            names.setdefault(_digest(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)), name)
    return names


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


def _number_duplicates(tensors: list[Any]) -> None:
    """Append a number to names that occur more than once."""
    seen: Counter[str] = Counter()
    for tensor in tensors:
        name = tensor.name
        seen[name] += 1
        if seen[name] > 1:
            tensor.name = f"{name}#{seen[name]}"


ANY_SIZE = "serving_default"
"""LiteRT's name for the only signature of a model with fixed input sizes, such as an image classifier."""


def to_litert(model: TorchModel, examples: Examples, lengths: tuple[int, ...]) -> bytes:
    """Convert a model to a `.tflite` file in fp32, for one row at a time; equal inputs give identical bytes.

    The file has a signature `length_N` for each of ``lengths``. Without lengths, `serving_default` takes inputs of the
    examples' shape. Integers are int32, and the output is the answer of the task. Raises `StageError` if litert-torch
    cannot convert the model.
    """
    row = _SingleRow(model.module.eval(), examples)
    with (
        _quiet_litert_torch() as litert_torch,
        lean_tracing(),
        row.looks_up_tables(),
        without_padding_masks(model.module),
        torch.no_grad(),
    ):
        converter = litert_torch.Converter()
        for length in lengths or (None,):
            name = ANY_SIZE if length is None else f"length_{length}"
            # An example with int32 integers, cut or repeated to ``length``, its last token masked.
            names = list(examples.padding)
            example_inputs = {name: value for name, value in tensors(examples, [0]).items() if name in names}
            if length is not None:
                example_inputs = {
                    name: value.repeat(1, -(-length // value.shape[1]))[:, :length]
                    for name, value in example_inputs.items()
                }
            narrow = {
                name: value if value.is_floating_point() else value.to(torch.int32)
                for name, value in example_inputs.items()
            }
            if length is not None and length > 1 and "attention_mask" in narrow:
                narrow["attention_mask"][:, -1] = 0
            converter.add_signature(name, row, sample_kwargs=narrow)
        try:
            content = _content(converter.convert())
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
            raise StageError(
                f"The model cannot be converted for LiteRT: {first_line(error)}",
                expected="operators that litert-torch supports",
                hint="leave this target out, or export to another format",
            ) from error
    return rename_tensors(content, {name: value.numpy() for name, value in model.tensors().items()})


class _SingleRow(nn.Module):
    """Module that computes the answer of one row from the row's inputs."""

    def __init__(self, module: nn.Module, examples: Examples) -> None:
        super().__init__()
        self.module = module
        self._examples = examples
        self._nothing: dict[str, torch.Tensor] = {}

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits or the embedding of one row."""
        first = next(iter(inputs.values()))
        # The comparison is false for all ids, but the converter cannot know that.
        self._nothing["zero"] = (first[:, :1] < 0).to(first.dtype)
        return {self._examples.answer: answers(self._examples, self.module(**inputs), inputs)}

    @contextlib.contextmanager
    def looks_up_tables(self) -> Iterator[None]:
        """Keep embedding tables, such as those of positions, as lookups.

        Their ids are constants, so the converter would fold each lookup and store its fp32 result once per length.
        Adding a
        zero that is computed from the input prevents the folding, so that the table itself is stored once.
        """
        word_embedding = token_embedding(self.module) if self._reads_ids() else None
        tables = [
            layer for layer in self.module.modules() if isinstance(layer, nn.Embedding) and layer is not word_embedding
        ]
        hooks = [table.register_forward_pre_hook(self._add_zero) for table in tables if self._reads_ids()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add_zero(self, table: nn.Module, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Add a zero that depends on the input to the ids of a lookup."""
        return (ids[0] + self._nothing["zero"], *ids[1:])

    def _reads_ids(self) -> bool:
        return "input_ids" in self._examples.padding


def _content(converted: Any) -> bytes:
    """Return the bytes of a converted model."""
    with tempfile.TemporaryDirectory() as folder:
        converted.export(str(Path(folder) / LITERT_FILE))
        return (Path(folder) / LITERT_FILE).read_bytes()


@contextlib.contextmanager
def _quiet_litert_torch() -> Iterator[Any]:
    """Import litert-torch without its progress output and its import messages."""
    # Both variables are read once, when the converter is loaded. The second suppresses a message about oneDNN.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with suppress_output("prints"):
        import litert_torch

        show_progress, litert_torch.config.show_progress = litert_torch.config.show_progress, False
        try:
            yield litert_torch
        finally:
            litert_torch.config.show_progress = show_progress


def word_embedding_name(model: TorchModel) -> str | None:
    """Return the name of the word embedding parameter; None for a model that reads no ids."""
    table = token_embedding(model.module)
    if table is None:
        return None
    name: str = next(name for name, value in model.module.named_parameters() if value is table.weight)
    return name


def quantize_litert(
    content: bytes, precision: Precision, table: str | None, embedding_bits: int | None, block: Blocks | None
) -> bytes:
    """Quantize the weights of a file; equal inputs give identical bytes.

    `int8` uses weights with a scale per channel, and rounds the inputs of products row by row in each call.
    `int8_weights` dequantizes the same weights where they are used. Embedding tables have 8 bits and a scale per row.

    Args:
        content: File in fp32.
        precision: Type of the weights.
        table: Name of the word embedding table, or None.
        embedding_bits: Bits of that table, or None for those of ``precision``.
        block: Weights of a row that share a scale at 4 bits, a divisor of the row length; None for a whole row.

    Raises:
        StageError: ai-edge-quantizer cannot quantize the model.
    """
    from ai_edge_quantizer import quantizer

    # Nothing is left to quantize.
    if precision == "fp32" and embedding_bits is None:
        return content
    # The recipe for ai-edge-quantizer; of two entries for an operator the later one applies.
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
        manager.add_dynamic_config(f"{re.escape(LOOKUP_SUFFIX)}", look_up, 8)
    if table is not None and embedding_bits is not None:
        granularity = qtyping.QuantGranularity
        by = granularity(f"BLOCKWISE_{block}") if embedding_bits == 4 and block else granularity.CHANNELWISE
        manager.add_dynamic_config(f"{re.escape(table + LOOKUP_SUFFIX)}", look_up, embedding_bits, by)
    recipe: list[dict[str, Any]] = manager.get_quantization_recipe()
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
