"""Advice for a model that exceeds a size limit: its largest tensors, and stages that shrink them."""

from __future__ import annotations

from collections.abc import Mapping

Stored = Mapping[str, tuple[str, tuple[int, ...], int]]
"""Type, shape and bytes of each stored tensor by name."""


def size_advice(stored: Stored, model_bytes: int, runtime_bytes: int, most: int) -> list[str]:
    """Return stages and options that shrink a model with these tensors, or reasons why none would; never empty.

    Args:
        stored: Stored tensors.
        model_bytes: Bytes of the model that count, compressed or not.
        runtime_bytes: Bytes of the runtime that count.
        most: Limit of both together.
    """
    advice = []
    total_bytes = sum(size for *_, size in stored.values()) or 1
    # Float weights can be quantized.
    floats = sum(size for kind, _, size in stored.values() if kind.lower() in ("float32", "f32")) / total_bytes
    if floats > 0.5:
        advice.append(f"{floats:.0%} of the weights are float32: the stage onnx_int8 makes them four times smaller")
    # One large tensor is usually an embedding.
    if stored:
        name, (_, shape, size) = max(stored.items(), key=lambda item: item[1][2])
        if size > total_bytes / 4 and len(shape) >= 2:
            share = f"the largest tensor, {name} {list(shape)}, is {size / total_bytes:.0%} of them"
            advice.append(
                f"{share}: for an embedding, trim_vocabulary (a higher min_count) or quantize: {{embedding_bits: 4}}"
            )
    if runtime_bytes > most:
        advice.append(f"the runtime alone has {runtime_bytes} bytes, so that no model fits")
    elif model_bytes > most / 2:
        advice.append("a smaller student (distill, prune) may save the rest")
    return advice or ["a larger budget"]
