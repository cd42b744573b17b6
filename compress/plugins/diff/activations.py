"""Where the values within two models part on the same inputs: by modules of torch, or by operators of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.intermediate_values import longest_length
from compress.formats.model_file import format_of, model_file, model_files
from compress.formats.onnx.intermediate_values import OnnxParts
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.formats.runtime import Session
from compress.inspection.layer_comparison import NOISE, Gap, compare_parts, gives_values, open_value_graph
from compress.inspection.node_layers import node_modules
from compress.inspection.value_matching import match
from compress.plugins.diff.answers import target_of
from compress.plugins.diff.record import Activations, Parting
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from torch import nn

_MOST = 200
"""Modules that a record keeps: those that part first."""


def modules_of(sessions: Sequence[Session]) -> list[nn.Module] | None:
    """Return the modules of both models if both were loaded whole in this process, or None."""
    found = [getattr(session, "module", None) for session in sessions]
    return found if all(hasattr(one, "named_modules") for one in found) else None  # type: ignore[return-value]


def compare_modules(
    modules: Sequence[nn.Module], sessions: Sequence[Session], batches: Sequence[Mapping[str, np.ndarray]]
) -> Activations:
    """Outputs of every module without parts of its own that both have, in the order in which they are computed."""
    names = [{name for name, module in one.named_modules() if not any(module.children())} for one in modules]
    shared = names[0] & names[1]
    gaps: dict[str, Gap] = {}
    shapes: set[str] = set()
    for batch in batches:
        old, new = (_outputs(one, session, batch, shared) for one, session in zip(modules, sessions, strict=True))
        for name, value in old.items():
            if name in new and value.shape == new[name].shape:
                gaps.setdefault(name, Gap()).add(value, new[name])
            else:
                shapes.add(name)
    parted = [Parting(module=name, error=min(gap.error, 1e9)) for name, gap in gaps.items()]
    first = next((one for one in parted if one.error > NOISE), None)
    lacking = sorted(names[0] ^ names[1])
    notes = [f"{len(lacking)} modules stand in one of both alone, such as {lacking[0]}"] if lacking else []
    notes += [f"{len(shapes)} modules give outputs of other shapes, such as {min(shapes)}"] if shapes else []
    return Activations(
        first=first.module if first else None,
        error=first.error if first else 0.0,
        modules=tuple(parted[:_MOST]),
        notes=tuple(notes),
    )


def compare_files(
    before: Path, after: Path, batches: Sequence[Mapping[str, np.ndarray]], progress: Progress
) -> Activations | None:
    """A graph of floats beside a file of any format that gives its values: which operators err more than bits explain.

    None where the file isn't written from such a graph, or the batches lack inputs of it. Raises what opening raises.
    """
    import onnx

    target = target_of(after)
    forms = format_of(before), FORMATS[format_of(after)]
    from_graph = OnnxModel.kind in (forms[1].name, forms[1].written_from)
    if forms[0] != OnnxModel.kind or not from_graph or not gives_values(target) or len(model_files(before)) > 1:
        return None
    file = model_file(before)
    graph = onnx.load(file)
    wanted = {one.name for one in graph.graph.input} - {one.name for one in graph.graph.initializer}
    if any(not wanted <= batch.keys() for batch in batches):
        return None
    given = [{name: batch[name] for name in wanted} for batch in batches]
    parts = open_value_graph(after, target, longest_length(given))
    if parts.shaped is not None:
        shaped = parts.shaped(given)
        parts, given = match(parts, OnnxParts(graph), shaped[0]), [dict(one) for one in shaped]
    compared = compare_parts(graph, node_modules(file), parts, given, progress)
    if compared is None:
        return None
    parted = [Parting(module=one.layer or one.name, error=min(one.error, 1e9)) for one in compared.departures]
    found = "departs" if len(parted) == 1 else "depart"
    note = f"{len(parted)} of {compared.parts} operators {found} by more than their bits explain"
    first = parted[0] if parted else None
    name, error = (first.module, first.error) if first else (None, 0.0)
    return Activations(first=name, error=error, modules=tuple(parted[:_MOST]), notes=(note,))


def _outputs(
    module: nn.Module, session: Session, batch: Mapping[str, np.ndarray], wanted: set[str]
) -> dict[str, np.ndarray]:
    """What the modules of those names gave the first time they were called."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if name not in found and hasattr(value, "detach") and value.is_floating_point():
                found[name] = value.detach().float().cpu().numpy()

        return hook

    hooks = [one.register_forward_hook(keep(name)) for name, one in module.named_modules() if name in wanted]
    try:
        session.predict(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
