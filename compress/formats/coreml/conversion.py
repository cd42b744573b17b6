"""Conversion of a torch model to a Core ML program, and check of the weights that the package stores."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from compress.formats.coreml.model import (
    PACKAGE,
    CoreMlModel,
    MilProgram,
    package_files,
    read_coreml,
    specification_of,
    weights_of,
)
from compress.formats.export_stage import refuse_unconvertible
from compress.formats.parity import Answers, check_parity, torch_answers
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import without_padding_masks
from compress.models.stored_tensor import StoredTensor
from compress.models.vocabulary import token_embedding
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError

if TYPE_CHECKING:
    from compress.models.model import TorchModel


Precision = Literal["fp32", "fp16", "int8"]
TableBits = Literal[4, 8]
_GROUP = 32
"""Weights of a row that share a scale in a 4-bit embedding table."""
_SMALL = 512
"""Number of weights below which a matrix stays in floating point, because its scales would outweigh the savings."""
_MASKED = -1e4
"""Value added to the attention score of a masked token. float16 can hold it, and its exponential is 0 as in float32."""
_SHORTEST = 2

_ROUNDING = 2.0**-10
"""Rounding error of float16 as a share of the value. For integers the scale is rounded to float16."""
_SMALLEST = 2.0**-24
"""Smallest positive number in float16."""


def to_coreml(
    model: TorchModel,
    examples: Examples,
    precision: Precision,
    table_bits: TableBits,
    max_length: int,
    tolerance: float,
) -> tuple[CoreMlModel, float]:
    """Convert a model for one row of 2 to ``max_length`` tokens; equal inputs give identical bytes.

    Images keep their shape. Integer inputs are int32, and the output is the answer of the task. In int8, weights have a
    scale per channel and arithmetic is float16. The model itself stays unchanged.

    Args:
        model: Torch model.
        examples: Examples that are traced and compared.
        precision: Type of the weights.
        table_bits: Bits of the word embedding table in int8; 4 uses a scale for every 32 weights.
        max_length: Largest number of tokens.
        tolerance: Largest accepted difference between the traced model and the torch model.

    Returns:
        The package, and the largest difference of the traced model's answers.

    Raises:
        StageError: coremltools cannot convert the model.
        IntegrityError: The traced model's answers differ by more than ``tolerance``.
    """
    # Trace with the longest example; the sequence axis stays free.
    row = _SingleRowModel(model.module, examples).eval()
    batch = tensors(examples, [int(examples.lengths().argmax())])
    sample = {name: batch[name].contiguous() for name in examples.padding}
    longest = max(max_length, *(value.shape[1] for value in sample.values()))
    with suppress_output("prints"), without_padding_masks(row.module), torch.no_grad():
        import coremltools

        sequence_length = torch.export.Dim("sequence_length", min=_SHORTEST, max=longest)
        shapes = tuple({} if examples.padding[name] is None else {1: sequence_length} for name in sample)
        with refuse_unconvertible("Core ML", "coremltools"):
            exported = torch.export.export(row, tuple(sample.values()), dynamic_shapes={"values": shapes})
            traced = exported.run_decompositions({})
            # The trace is compared in torch, because Core ML itself runs on macOS only.
            reference, trace_answers = torch_answers(model.module, examples), _trace_answers(traced.module(), examples)
            what = f"As traced for Core ML the {examples.answer_label} differ from the model's"
            parity = check_parity(reference, trace_answers, examples, tolerance, what)
            converted = coremltools.convert(
                traced,
                convert_to="mlprogram",
                compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "fp32" else "FLOAT16"),
                # iOS 18 is the first version that has 4-bit weights in groups.
                minimum_deployment_target=coremltools.target.iOS18,
                skip_model_load=True,
            )
        if precision == "int8":
            converted = _quantize_weights(coremltools, converted, token_embedding(model.module), table_bits)
        package = _reproducible_package(coremltools, converted, [*sample, examples.answer])
        return CoreMlModel(package, model.companions()), parity.worst


def _reproducible_package(coremltools: Any, converted: Any, names: Sequence[str]) -> dict[str, bytes]:
    """Return the files that coremltools saves, with the names of inputs and outputs and without the conversion date."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model.mlpackage"
        converted.save(str(package))
        specification_file = specification_of(package)
        specification = type(converted.get_spec()).FromString(specification_file.read_bytes())
        weights = weights_of(specification_file).read_bytes()
    description = specification.description
    for feature, name in zip([*description.input, *description.output], names, strict=True):
        coremltools.utils.rename_feature(specification, feature.name, name)
    description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    return package_files(specification.SerializeToString(deterministic=True), weights)


class _SingleRowModel(nn.Module):
    """Module that computes the answer of one row.

    Its float mask replaces boolean masks, which coremltools cannot convert.
    """

    def __init__(self, module: Any, examples: Examples) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        # Eager attention takes our additive mask unchanged. Without a mask of ours it would build one itself.
        masked = "attention_mask" in examples.padding
        if masked and hasattr(self.module, "set_attn_implementation"):
            self.module.set_attn_implementation("eager")
        self._examples = examples

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Return the logits or the embedding of one row."""
        inputs = dict(zip(self._examples.padding, values, strict=True))
        model_inputs = dict(inputs)
        if (mask := inputs.get("attention_mask")) is not None:
            model_inputs["attention_mask"] = (1.0 - mask[:, None, None, :].to(torch.float32)) * _MASKED
        return answers(self._examples, self.module(**model_inputs), inputs)


def _trace_answers(traced_module: Any, examples: Examples) -> Answers:
    """Return a function that answers with the trace, row by row and including padding."""

    def answered(indices: Sequence[int]) -> np.ndarray:
        batch = tensors(examples, list(indices))
        inputs = [batch[name] for name in examples.padding]
        return torch.cat(
            [traced_module(*(value[at : at + 1] for value in inputs)) for at in range(len(indices))]
        ).numpy()

    return answered


def _quantize_weights(coremltools: Any, program: Any, embedding: nn.Embedding | None, table_bits: TableBits) -> Any:
    """Return the program with 8-bit weights per channel, and a 4-bit word embedding table if requested."""
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig, linear_quantize_weights

    symmetric = partial(OpLinearQuantizerConfig, mode="linear_symmetric")
    names: set[str] = set()
    if embedding is not None and table_bits == 4 and embedding.embedding_dim % _GROUP == 0:
        # Find the constants of the embedding's shape that rows are gathered from.
        shape = tuple(embedding.weight.shape)
        for operation in program._mil_program.functions["main"].operations:
            if operation.op_type in ("gather", "gather_nd", "gather_along_axis"):
                source = operation.inputs["x"].op
                if source is not None and source.op_type == "const" and tuple(source.outputs[0].shape) == shape:
                    names.add(source.name)
    int4_config = symmetric(dtype="int4", granularity="per_block", block_size=_GROUP, weight_threshold=0)
    int8_config = symmetric(dtype="int8", granularity="per_channel", weight_threshold=_SMALL)
    tables = dict.fromkeys(sorted(names), int4_config)
    return linear_quantize_weights(program, OptimizationConfig(global_config=int8_config, op_name_configs=tables))


def check_stored_weights(package: CoreMlModel, model: TorchModel) -> str:
    """Compare each stored matrix with the model's and return a summary.

    A matrix that combines two parameters, such as a convolution folded with its normalization, is not compared.

    Raises:
        IntegrityError: A stored matrix differs by more than half a quantization step, or no matrix belongs to the
            model.
    """
    program = read_coreml(package.specification, package.weights, Path(PACKAGE))
    # A parameter's name as the trace spells it.
    parameters = {name.replace(".", "_").lower(): value for name, value in model.tensors().items()}
    differences = []
    for constant in program.constants:
        # The parameter that a stored constant is named after, without coremltools' suffixes.
        name = constant.name.removeprefix("p_module_").removeprefix("b_module_")
        while name and name not in parameters:
            name = name.rpartition("_")[0]
        parameter = parameters.get(name)
        if parameter is None or constant.role == "quantization" or parameter.ndim < 2:
            continue
        if tuple(parameter.shape) != constant.shape:
            continue
        expected = parameter.float().numpy()
        values, step = stored_values(program, constant, package.weights)
        difference = np.abs(values - expected)
        # Half a quantization step, plus the rounding of the scale or value to float16.
        excess = difference - 0.5 * step - _ROUNDING * np.abs(expected) - _SMALLEST
        if not excess.max() <= 0:
            raise IntegrityError(
                f"The stored matrix {constant.name!r} differs from the model's by {difference.max():.2e}.",
                expected="at most half a step of its grid",
                hint="this is a defect of the stage; please report it with the recipe",
            )
        differences.append(float(difference.max()))
    if not differences:
        raise IntegrityError("No stored matrix of the package is the model's.", expected="its weights by their names")
    matrices = sum(value.ndim > 1 and value.is_floating_point() for value in parameters.values())
    worst = f"at most {max(differences):.1e} from the float weights"
    return f"{len(differences)} of {matrices} matrices were read back, {worst}"


def stored_values(program: MilProgram, one: StoredTensor, weights: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a constant and the step of its grid, both float32 of its shape; the step of floats is 0."""
    values = one.values(weights).astype(np.float32)
    step = program.steps.get(one.name)
    if step is None:
        return values, np.zeros_like(values)
    # Repeat each step over the weights of its group.
    for axis, size in enumerate(one.shape):
        step = np.repeat(step, size // step.shape[axis], axis)
    return values * step, step
