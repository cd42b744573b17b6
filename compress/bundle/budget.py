"""A budget of bytes that a bundle misses: what is biggest, and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from compress.bundle.graph import Contents
from compress.errors import InputError

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
    shown = ", ".join(f"{name} {sizes[name] / _MEGABYTE:.2f} MB" for name in largest)
    raise InputError(
        f"The bundle has {found / _MEGABYTE:.2f} MB compressed, {(found - most) / _MEGABYTE:.2f} MB too many.",
        where=f"biggest, compressed: {shown}",
        expected=f"at most {most} bytes",
        mend="; ".join(_advice(sizes, most, model, contents)),
    )


def _advice(sizes: Mapping[str, int], most: int, model: str, contents: Contents) -> list[str]:
    advice = []
    whole = sum(size for *_, size in contents.stored.values()) or 1
    floats = sum(size for kind, _, size in contents.stored.values() if kind == "float32") / whole
    name, (_, shape, size) = max(contents.stored.items(), key=lambda item: item[1][2])
    if floats > 0.5:
        advice.append(f"{floats:.0%} of the weights are float32: the stage quantize makes them four times smaller")
    if size > whole / 4 and len(shape) == 2:
        share = f"the largest tensor, {name} {list(shape)}, is {size / whole:.0%} of them"
        advice.append(
            f"{share}: for an embedding, trim_vocabulary (a higher min_count) or quantize: {{embedding_bits: 4}}"
        )
    runtime = sum(size for name, size in sizes.items() if name.startswith("runtime/"))
    if runtime > most:
        advice.append(f"the runtime alone has {runtime} bytes compressed, so that no model fits")
    elif sizes.get(model, 0) > most / 2:
        advice.append("a smaller student (distill, prune) takes what is left")
    return advice or ["a larger budget"]
