"""Which layer gets how many bits: the least expected divergence that a budget of bits allows, found exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from compress.numerics.bit_allocation import Option, allocate_bits
from compress.stages.blockwise.layers import Layer
from compress.stages.gptq.sensitivity import TABLES, Sensitivity
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError

FLOAT_BITS = 16
_SCALE_BITS = 16


@dataclass(frozen=True)
class Allocation:
    """The bits of each layer by name, and of the tables; ``average`` counts every parameter and every scale."""

    bits: Mapping[str, int]
    tables: int
    average: float
    divergence: float


def stored_bits(layer: Layer, bits: int | None, symmetric: bool) -> int:
    """Return the bits a layer takes at ``bits``: integers, scales and, if needed, zero points."""
    elements = layer.rows * layer.columns
    if bits is None or bits == FLOAT_BITS:
        return FLOAT_BITS * elements
    assert layer.group_size is not None
    groups = layer.rows * ceil(layer.columns / layer.group_size)
    return bits * elements + groups * (_SCALE_BITS + (0 if symmetric else bits))


def average_bits(plan: Sequence[Sequence[Layer]], tables: Sequence[Layer], parameters: int, symmetric: bool) -> float:
    """Bits of a parameter, on average over all of the model's ``parameters``, those that stay float16 included."""
    layers = [*tables, *(layer for block in plan for layer in block)]
    counted = sum(stored_bits(layer, layer.bits, symmetric) for layer in layers)
    rest = parameters - sum(layer.rows * layer.columns for layer in layers)
    return (counted + FLOAT_BITS * rest) / parameters


def allocate(
    config: Quantization,
    plan: Sequence[Sequence[Layer]],
    tables: Sequence[Layer],
    parameters: int,
    sensitivity: Sensitivity,
    table_choices: Sequence[int],
    together: Sequence[Sequence[str]] = (),
) -> Allocation:
    """Choose the best bits within ``target_bits`` or ``max_bytes``. Raises `StageError` for a budget that nothing fits.

    ``tables`` have the group size that they would have; all of them get the same bits, one of ``table_choices``. So do
    layers whose names stand ``together``.
    """
    layers = [layer for block in plan for layer in block if layer.bits]
    sets = _sets(layers, together)
    choices = [sorted(sensitivity[members[0].name]) for members in sets]
    units = [
        [
            Option(
                sum(stored_bits(layer, bits, config.sym) for layer in members),
                sum(sensitivity[layer.name][bits] for layer in members),
            )
            for bits in options
        ]
        for members, options in zip(sets, choices, strict=True)
    ]
    of_tables = sensitivity.get(TABLES, {})
    units.append(
        [
            Option(sum(stored_bits(table, bits, config.sym) for table in tables), of_tables.get(bits, 0.0))
            for bits in table_choices
        ]
    )
    choices.append(list(table_choices))
    alone = parameters - sum(layer.rows * layer.columns for layer in (*layers, *tables))
    if config.max_bytes is not None:
        budget, goal = 8 * config.max_bytes, f"max_bytes: {config.max_bytes:,}"
    else:
        assert config.target_bits is not None
        budget, goal = int(config.target_bits * parameters), f"target_bits: {config.target_bits:g}"
    try:
        chosen = allocate_bits(units, budget - FLOAT_BITS * alone)
    except ValueError as error:
        least = sum(min(option.size_bits for option in unit) for unit in units) + FLOAT_BITS * alone
        raise StageError(
            f"No choice of bits keeps to {goal}: the least possible is {least / parameters:.2f} bits on "
            f"average, {ceil(least / 8):,} bytes.",
            hint="raise target_bits or max_bytes, allow fewer bits in `choices`, or widen group_size",
        ) from error
    size = sum(unit[index].size_bits for unit, index in zip(units, chosen, strict=True)) + FLOAT_BITS * alone
    loss = sum(unit[index].loss for unit, index in zip(units, chosen, strict=True))
    bits = [options[index] for options, index in zip(choices, chosen, strict=True)]
    of_layers = {layer.name: some for members, some in zip(sets, bits[:-1], strict=True) for layer in members}
    return Allocation(of_layers, bits[-1], size / parameters, loss)


def _sets(layers: Sequence[Layer], together: Sequence[Sequence[str]]) -> list[list[Layer]]:
    """Return the layers grouped with those that must get the same bits, in the order of the first of each group."""
    first = {name: names[0] for names in together for name in names}
    sets: dict[str, list[Layer]] = {}
    for layer in layers:
        sets.setdefault(first.get(layer.name, layer.name), []).append(layer)
    return list(sets.values())
