"""`quantization_config` of a checkpoint: settings of each layer, and the form that compressed-tensors writes.

Importing this module needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.utils.errors import ModelError
from compress.utils.read_limits import LIMITS, ReadLimitError

COMPRESSED_TENSORS = "compressed-tensors"
LINEAR = "Linear"
"""Target that means all linear layers except those in `ignore`."""
Scheme = tuple[int, int]
"""Bits of a layer's weights, and columns that share a scale (-1: all)."""


def layer_settings(quantization: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Return `bits`, `group_size` and `sym` of a layer, each None if a `quantization_config` does not set it.

    GPTQ's `dynamic` entries override the settings for matching layers. In compressed-tensors, the group that names the
    layer applies, else the group of its class.

    Raises an `AttributeError`, a `TypeError` or a `ValueError` for a config whose fields have other types.
    """
    if quantization.get("quant_method") == COMPRESSED_TENSORS:
        groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
        # A group that names the layer takes precedence over one for all linear layers.
        matching = (
            group
            for group in groups
            for target in group.get("targets") or ()
            if (_matches(target[3:], module) if target.startswith("re:") else target == module)
        )
        scheme = next(matching, None) or next((group for group in groups if LINEAR in (group.get("targets") or ())), {})
        weights = scheme.get("weights") or {}
        size = weights.get("group_size")
        return {"bits": weights.get("num_bits"), "group_size": size or -1, "sym": weights.get("symmetric")}
    settings = {key: quantization.get(key) for key in ("bits", "group_size", "sym")}
    # GPTQModel's patterns: "-:" excludes layers, "+:" or nothing changes settings.
    for pattern, changes in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and _matches(pattern.removeprefix("+:"), module):
            return settings | {key: changes[key] for key in settings if key in changes}
    return settings


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern of a config matches the start of a layer's name.

    Raises `ReadLimitError` for a pattern that takes too long, as one with nested repetitions may, and `ModelError` for
    one that is no regular expression.
    """
    # The standard library has no limit of time. transformers requires this package.
    import regex

    where = "quantization_config"
    try:
        return regex.match(pattern, module, timeout=LIMITS.pattern_seconds) is not None
    except TimeoutError as error:
        hint = "the model may be made to stop this program: use one that you trust"
        what = f"The pattern {pattern[:80]!r} takes too long for the layer {module[:80]!r}."
        raise ReadLimitError(what, where=where, expected=f"at most {LIMITS.pattern_seconds} s", hint=hint) from error
    except regex.error as error:
        raise ModelError(f"The pattern {pattern[:80]!r} is no regular expression: {error}.", where=where) from error


def compressed_tensors_config(
    layers: Mapping[str, Scheme], others: Sequence[str], activation_bits: int, version: str
) -> dict[str, Any]:
    """Return the `quantization_config` that llm-compressor writes for layers without zero points.

    Args:
        layers: Scheme of each quantized layer by name.
        others: Layers that stay float.
        activation_bits: With 8, inputs are quantized too, with one dynamic scale per token.
        version: Version of the package compressed-tensors that defines the layout.
    """
    packing = "pack-quantized" if activation_bits > 8 else "int-quantized"
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in layers.items():
        groups.setdefault(scheme, []).append(name)
    # A single scheme is for all linear layers.
    if len(groups) == 1:
        groups = {scheme: [LINEAR] for scheme in groups}
    return {
        "config_groups": {
            f"group_{number}": {
                "format": packing,
                # Activations use one dynamic scale per token.
                "input_activations": None if activation_bits > 8 else _arguments(activation_bits, "token", None),
                "output_activations": None,
                "targets": targets,
                "weights": _arguments(bits, *(("channel", None) if size == -1 else ("group", size))),
            }
            for number, ((bits, size), targets) in enumerate(groups.items())
        },
        "format": packing,
        "global_compression_ratio": None,
        "ignore": list(others),
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": version,
    }


def _arguments(bits: int, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": strategy == "token",
        "group_size": group_size,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
    }
