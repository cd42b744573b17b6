"""Proof that a Core ML package stores a model's weights: each matrix within half a step of its grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.coreml.model import PACKAGE, CoreMlModel
from compress.formats.coreml.read import MilProgram, read_coreml
from compress.models.stored_tensor import StoredTensor
from compress.utils.errors import IntegrityError

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel

_ROUNDING = 2.0**-10
"""Of float16, a value's share; in integers it is the scale that is rounded to it."""
_SMALLEST = 2.0**-24
"""Above 0 in float16."""


def prove_stored(made: CoreMlModel, model: TorchModel) -> str:
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
