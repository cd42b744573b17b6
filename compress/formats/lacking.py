"""Check of a format's package: import everything that its spec refers to and list the faults."""

from __future__ import annotations

from typing import Any

from compress.formats.probed import Probing
from compress.formats.registry import FORMATS
from compress.formats.runtime import Runtime
from compress.formats.spec import load


def lacking(form: str) -> list[str]:
    """Import everything that a format refers to and return what cannot be used, with the reasons."""
    faults = []
    for what, reference in FORMATS[form].references().items():
        try:
            fault = _fault(what, load(reference))
        except Exception as error:  # noqa: BLE001  # somebody else's module may raise anything while it is imported
            fault = f"cannot be imported: {error}"
        faults += [f"its {what} {reference} {fault}"] if fault else []
    return faults


def _fault(what: str, found: Any) -> str | None:
    if what == "probed":
        return None if isinstance(found, Probing) else "is no Probing"
    if not what.startswith("runtime "):
        return None if callable(found) else "cannot be called"
    absent = [name for name in vars(Runtime) if not name.startswith("_") and not hasattr(found, name)]
    return f"lacks {', '.join(absent)}" if absent else None
