"""A size budget that is missed: what is biggest, and what would help."""

from __future__ import annotations

from collections.abc import Mapping

Stored = Mapping[str, tuple[str, tuple[int, ...], int]]
"""Of each stored tensor: the name of its type, its shape and its bytes."""


def what_helps(stored: Stored, model_bytes: int, runtime_bytes: int, most: int) -> list[str]:
    """Stages and options that make a model of these tensors smaller, or why none would; never empty.

    ``model_bytes`` and ``runtime_bytes`` are those that count, compressed or not, of at most ``most`` together.
    """
    advice = []
    whole = sum(size for *_, size in stored.values()) or 1
    floats = sum(size for kind, _, size in stored.values() if kind.lower() in ("float32", "f32")) / whole
    if floats > 0.5:
        advice.append(f"{floats:.0%} of the weights are float32: the stage quantize makes them four times smaller")
    if stored:
        name, (_, shape, size) = max(stored.items(), key=lambda item: item[1][2])
        if size > whole / 4 and len(shape) >= 2:
            share = f"the largest tensor, {name} {list(shape)}, is {size / whole:.0%} of them"
            advice.append(
                f"{share}: for an embedding, trim_vocabulary (a higher min_count) or quantize: {{embedding_bits: 4}}"
            )
    if runtime_bytes > most:
        advice.append(f"the runtime alone has {runtime_bytes} bytes, so that no model fits")
    elif model_bytes > most / 2:
        advice.append("a smaller student (distill, prune) takes what is left")
    return advice or ["a larger budget"]
