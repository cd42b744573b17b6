"""A torch model as a Core ML program: traced with a mask of floats, converted, with fewer bits if asked."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from compress.formats.coreml.model import (
    PACKAGE,
    CoreMlModel,
    MilProgram,
    package_of,
    read_coreml,
    specification_of,
    weights_of,
)
from compress.formats.parity import Answers, check_parity, torch_answers
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import without_padding_masks
from compress.models.stored_tensor import StoredTensor
from compress.models.vocabulary import token_embedding
from compress.tasks.inference import answers, tensors
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError, first_line

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel


Precision = Literal["fp32", "fp16", "int8"]
TableBits = Literal[4, 8]
_GROUP = 32
"""Weights of a row that share a scale in 4 bits."""
_SMALL = 512
"""Weights of a matrix that isn't worth its scales."""
_MASKED = -1e4
"""Added to what a masked token scores: float16 holds it, and its exponential is 0 there as in float32."""
_SHORTEST = 2

_ROUNDING = 2.0**-10
"""Of float16, a value's share; in integers it is the scale that is rounded to it."""
_SMALLEST = 2.0**-24
"""Above 0 in float16."""


def to_coreml(
    model: TorchModel,
    examples: Examples,
    precision: Precision,
    table_bits: TableBits,
    max_length: int,
    tolerance: float,
) -> tuple[CoreMlModel, float]:
    """``model``, which stays as it is, for one row of 2 to ``max_length`` tokens; the same bytes each time.

    Images keep the shape that they have. Integers are int32; the output is the answer of the task. In int8 weights have
    a scale for each channel, a table of words of ``table_bits`` 4 one for each 32 weights, and arithmetic is float16.
    Also gives by how much the traced torch model's answers are off, which is held to ``tolerance``. Raises
    `StageError` where coremltools can't, `IntegrityError` where the trace answers otherwise.
    """
    row = _OneRow(model.module, examples).eval()
    sample = _sample(examples)
    longest = max(max_length, *(value.shape[1] for value in sample.values()))
    with suppress_output("prints"), without_padding_masks(row.module), torch.no_grad():
        import coremltools

        # Positions of 1 row and any length.
        free = torch.export.Dim("sequence_length", min=_SHORTEST, max=longest)
        shapes = tuple({} if examples.padding[name] is None else {1: free} for name in sample)
        try:
            traced = torch.export.export(
                row, tuple(sample.values()), dynamic_shapes={"values": shapes}
            ).run_decompositions({})
            reference, found = torch_answers(model.module, examples), _of_trace(traced.module(), examples)
            what = f"As traced for Core ML the {examples.answer_label} differ from the model's"
            apart = check_parity(reference, found, examples, tolerance, what).worst
            made = coremltools.convert(
                traced,
                convert_to="mlprogram",
                compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "fp32" else "FLOAT16"),
                # The first that has weights of 4 bits in groups.
                minimum_deployment_target=coremltools.target.iOS18,
                skip_model_load=True,
            )
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError, KeyError) as error:
            raise StageError(
                f"The model cannot be converted for Core ML: {first_line(error)}",
                expected="operators that coremltools knows",
                hint="leave this target out, or export to another format",
            ) from error
        if precision == "int8":
            made = _in_few_bits(coremltools, made, token_embedding(model.module), table_bits)
        return _packed(coremltools, made, model, [*sample, examples.answer]), apart


class _OneRow(nn.Module):
    """The model, from a row's inputs to its answer; coremltools can't follow the logic of whole masks."""

    def __init__(self, module: Any, examples: Examples) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        # Without a mask of ours the eager one would make its own.
        masked = "attention_mask" in examples.padding
        if masked and hasattr(self.module, "set_attn_implementation"):
            self.module.set_attn_implementation("eager")
        self._examples = examples

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """The logits or the embedding of one row."""
        inputs = dict(zip(self._examples.padding, values, strict=True))
        given = dict(inputs)
        if "attention_mask" in given:
            given["attention_mask"] = (1.0 - given["attention_mask"][:, None, None, :].to(torch.float32)) * _MASKED
        return answers(self._examples, self.module(**given), inputs)


def _sample(examples: Examples) -> dict[str, torch.Tensor]:
    """The longest example."""
    found = tensors(examples, [int(examples.lengths().argmax())])
    return {name: found[name].contiguous() for name in examples.padding}


def _of_trace(traced: Any, examples: Examples) -> Answers:
    """What the trace answers, row by row, padding and all."""

    def answered(indices: Sequence[int]) -> np.ndarray:
        batch = tensors(examples, list(indices))
        given = [batch[name] for name in examples.padding]
        return torch.cat([traced(*(value[at : at + 1] for value in given)) for at in range(len(indices))]).numpy()

    return answered


def _in_few_bits(coremltools: Any, made: Any, words: nn.Embedding | None, table_bits: TableBits) -> Any:
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig, linear_quantize_weights

    own = {}
    if words is not None and table_bits == 4 and words.embedding_dim % _GROUP == 0:
        four = OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=_GROUP, weight_threshold=0
        )
        own = dict.fromkeys(_tables(made, tuple(words.weight.shape)), four)
    eight = OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=_SMALL
    )
    return linear_quantize_weights(made, OptimizationConfig(global_config=eight, op_name_configs=own))


def _tables(made: Any, shape: tuple[int, ...]) -> list[str]:
    """Names of the constants that rows are looked up in, of the words' shape."""
    found = []
    for operation in made._mil_program.functions["main"].operations:
        if operation.op_type in ("gather", "gather_nd", "gather_along_axis"):
            source = operation.inputs["x"].op
            if source is not None and source.op_type == "const" and tuple(source.outputs[0].shape) == shape:
                found.append(source.name)
    return sorted(set(found))


def _packed(coremltools: Any, made: Any, model: TorchModel, names: Sequence[str]) -> CoreMlModel:
    """What coremltools would save, under ``names`` of inputs and outputs, and without the day that it was made on."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model.mlpackage"
        made.save(str(package))
        place = specification_of(package)
        specification = type(made.get_spec()).FromString(place.read_bytes())
        weights = weights_of(place).read_bytes()
    told = specification.description
    for feature, name in zip([*told.input, *told.output], names, strict=True):
        coremltools.utils.rename_feature(specification, feature.name, name)
    specification.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    return CoreMlModel(package_of(specification.SerializeToString(deterministic=True), weights), model.companions())


def check_stored_weights(made: CoreMlModel, model: TorchModel) -> str:
    """What to tell of the weights that were read back. Raises `IntegrityError` where a stored matrix is no model's.

    A matrix that is made of two, such as a convolution with the normalisation after it, isn't held to anything.
    """
    program = read_coreml(made.specification, made.weights, Path(PACKAGE))
    known = {_plain(name): value for name, value in model.tensors().items()}
    held = 0
    worst = 0.0
    for one in program.constants:
        name = _origin(one.name, known)
        if name is None or one.role == "quantization" or known[name].ndim < 2 or tuple(known[name].shape) != one.shape:
            continue
        expected = known[name].float().numpy()
        found, step = stored_values(program, one, made.weights)
        apart = np.abs(found - expected)
        off = apart - 0.5 * step - _ROUNDING * np.abs(expected) - _SMALLEST
        if not off.max() <= 0:
            raise IntegrityError(
                f"The stored matrix {one.name!r} differs from the model's by {apart.max():.2e}.",
                expected="at most half a step of its grid",
                hint="this is a defect of the stage; please report it with the recipe",
            )
        held += 1
        worst = max(worst, float(apart.max()))
    if held == 0:
        raise IntegrityError("No stored matrix of the package is the model's.", expected="its weights by their names")
    matrices = sum(value.ndim > 1 and value.is_floating_point() for value in known.values())
    return f"{held} of {matrices} matrices were read back, at most {worst:.1e} from the float weights"


def stored_values(program: MilProgram, one: StoredTensor, weights: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A constant's values and the step of its grid, both of its shape, in float32; a step of 0 for floats."""
    values = one.values(weights).astype(np.float32)
    step = program.steps.get(one.name)
    if step is None:
        return values, np.zeros_like(values)
    for axis, size in enumerate(one.shape):
        step = np.repeat(step, size // step.shape[axis], axis)
    return values * step, step


def _plain(name: str) -> str:
    """A parameter's name as the trace spells it."""
    return name.replace(".", "_").lower()


def _origin(name: str, known: Mapping[str, object]) -> str | None:
    """The parameter that a stored constant is named after, with what coremltools appends to it cut off."""
    found = name.removeprefix("p_module_").removeprefix("b_module_")
    while found and found not in known:
        found = found.rpartition("_")[0]
    return found or None
