"""A budget of bytes that a bundle misses: what is biggest, and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from compress.errors import InputError
from compress.formats.bundled import Contents
from compress.inspect.size_advice import what_helps

_MANY = 5
_MEGABYTE = 1e6


def check_budget(sizes: Mapping[str, int], most: int, model: str, contents: Contents) -> None:
    """Raises `InputError` for more than ``most`` bytes, with the largest files and what makes them smaller.

    ``sizes`` are those of the files as they are transferred.
    """
    found = sum(sizes.values())
    if found <= most:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_MANY]
    runtime = sum(size for name, size in sizes.items() if name.startswith("runtime/"))
    weighed = sum(size for name, size in sizes.items() if name == model or name.startswith(f"{model}/"))
    shown = ", ".join(f"{name} {sizes[name] / _MEGABYTE:.2f} MB" for name in largest)
    raise InputError(
        f"The bundle has {found / _MEGABYTE:.2f} MB compressed, {(found - most) / _MEGABYTE:.2f} MB too many.",
        where=f"biggest, compressed: {shown}",
        expected=f"at most {most} bytes",
        mend="; ".join(what_helps(contents.stored, weighed, runtime, most)),
    )
