"""Where the values within two torch models part: the outputs of their modules on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.diff.record import Activations, Parting
from compress.inspect.departures import NOISE, Gap
from compress.runtimes.runtime import Session

if TYPE_CHECKING:
    from torch import nn

_MOST = 200
"""Modules that a record keeps: those that part first."""


def modules_of(sessions: Sequence[Session]) -> list[nn.Module] | None:
    """Those of both, where both were loaded whole in this process; else None."""
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
