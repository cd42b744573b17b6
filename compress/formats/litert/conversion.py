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

from compress.formats.export_stage import refuse_unconvertible
from compress.formats.litert.model import LITERT_FILE, Blocks, Precision
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import lean_tracing, without_padding_masks
from compress.models.vocabulary import token_embedding
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError

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
    # Names of parameters by the digests of their values, including transposed ones.
    parameter_names: dict[str, str] = {}
    for name, values in parameters.items():
        for array in (values, values.T):
            parameter_names.setdefault(_digest(array), name)
    seen: Counter[str] = Counter()
    for number, graph in enumerate(model.subgraphs):
        suffix = f"@{number}" if number else ""
        names = []
        for index, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            stored = data is not None and len(data)
            names.append(parameter_names.get(_digest(data), f"constant_{index}") if stored else f"value_{index}")
        for operator in graph.operators:
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) == _LOOK_UP:
                names[operator.outputs[0]] = f"{names[operator.inputs[1]]}{LOOKUP_SUFFIX}"
        # A name that occurs again gets a number.
        for tensor, name in zip(graph.tensors, names, strict=True):
            tensor.name = f"{name}{suffix}"
            seen[tensor.name] += 1
            tensor.name += f"#{count}" if (count := seen[tensor.name]) > 1 else ""
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _digest(values: Any) -> str:
    return hashlib.sha256(np.asarray(values).tobytes()).hexdigest()


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
            # An example with int32 integers, cut or repeated to ``length``, its last token masked.
            sample = {}
            for name, value in tensors(examples, [0]).items():
                if name in examples.padding:
                    fitted = value if length is None else value.repeat(1, -(-length // value.shape[1]))[:, :length]
                    sample[name] = fitted if fitted.is_floating_point() else fitted.to(torch.int32)
            if length is not None and length > 1 and "attention_mask" in sample:
                sample["attention_mask"][:, -1] = 0
            converter.add_signature(ANY_SIZE if length is None else f"length_{length}", row, sample_kwargs=sample)
        with refuse_unconvertible("LiteRT", "litert-torch"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / LITERT_FILE
            converter.convert().export(str(file))
            content = file.read_bytes()
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

        def add_zero(table: nn.Module, ids: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (ids[0] + self._nothing["zero"], *ids[1:])

        hooks = []
        if "input_ids" in self._examples.padding:
            word_embedding = token_embedding(self.module)
            tables = (layer for layer in self.module.modules() if isinstance(layer, nn.Embedding))
            hooks = [table.register_forward_pre_hook(add_zero) for table in tables if table is not word_embedding]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


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
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe_manager

    # Nothing is left to quantize.
    if precision == "fp32" and embedding_bits is None:
        return content
    # The recipe for ai-edge-quantizer; of two entries for an operator the later one applies.
    manager = recipe_manager.RecipeManager()
    every, look_up = qtyping.TFLOperationName.ALL_SUPPORTED, qtyping.TFLOperationName(_LOOK_UP)
    if precision == "fp16":
        manager.add_weight_only_config(".*", every, 16, algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING)
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
    try:
        with suppress_output("prints"):  # it has a bar that nothing turns off
            quantizing = quantizer.Quantizer(content, manager.get_quantization_recipe())
            quantized = quantizing.quantize(enable_progress_bar=False, enable_progress_report=False)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise StageError(
            f"The model cannot be quantized for LiteRT: {error}", hint="set precision: fp32, or leave this target out"
        ) from error
    return bytes(quantized.quantized_model)
