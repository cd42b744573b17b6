"""Which layers of the blocks are quantized, at how many bits, and which are left alone and why: before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from compress.models.experts import inseparable_reason, is_fused, router_layers
from compress.models.gptq_layout import fits
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.gptq.settings import FLOAT_BITS, Quantization
from compress.utils.errors import ModelError, StageError

_SHOWN = 7
_NARROW = 128
_FUSED_ON_DISK = "checkpoints of this architecture keep all experts in one tensor"


@dataclass(frozen=True)
class Layer:
    """Plan and result for one weight matrix [rows, columns] of a block; ``bits`` None leaves it alone, see ``why``.

    ``error``: of its outputs on the calibration text, relative: tr(E H E^T) / tr(W H W^T); of its weights alone where
    no text was read. ``damping`` is what the Hessian's diagonal really needed, ``dead_columns`` its inputs that were
    always 0. ``tokens``, of an expert's layer: how many tokens of the calibration text the router sent it; ``starved``
    where these are fewer than `expert_tokens`. ``block_error``, where the block was trained afterwards: of the block's
    outputs on held-out text, relative; ``error`` is then what training began with.
    """

    name: str
    rows: int
    columns: int
    bits: int | None
    group_size: int | None = None
    why: str = ""
    error: float | None = None
    damping: float | None = None
    dead_columns: int = 0
    tokens: int | None = None
    starved: bool | None = None
    block_error: float | None = None

    def solved(self, error: float, damping: float | None = None, dead_columns: int = 0) -> Layer:
        """Return the layer with the results of its solver."""
        return replace(self, error=error, damping=damping, dead_columns=dead_columns)

    def sent(self, tokens: int, minimum: int) -> Layer:
        """Return the layer of an expert with the number of tokens that the router sent it."""
        return replace(self, tokens=tokens, starved=True if tokens < minimum else None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that files store."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def plan_layers(decoder: BlockwiseModel, config: Quantization) -> tuple[tuple[Layer, ...], ...]:
    """Return the layers of every block. Raises `ModelError` that lists all layers which the format cannot hold."""
    plan = tuple(_block_layers(decoder, index, config) for index in range(len(decoder.blocks)))
    layers = [layer for block in plan for layer in block]
    # Refuse experts that cannot be told apart, unless they are to stay as they are.
    fused_experts = []
    for index, block in enumerate(decoder.blocks):
        for name, part in block.named_modules(prefix=f"{decoder.prefix}.{index}"):
            leaves = [f"{name}.{leaf}" for leaf, _ in part.named_parameters(recurse=False)]
            if is_fused(part) and not all(skip_reason(config.keep, leaf) for leaf in leaves):
                fused_experts.append(f"{name}: {inseparable_reason(part) or _FUSED_ON_DISK}")
    if fused_experts:
        raise ModelError(
            f"The experts of {len(fused_experts)} blocks cannot be quantized one by one:\n  {_some(fused_experts)}",
            where=str(decoder.checkpoint.folder),
            expected="experts such as those of Mixtral, Qwen-MoE, OLMoE or DeepSeek, a matrix each in the files",
            hint=f"leave them in float16: keep: ['*.{fused_experts[0].partition(':')[0].rpartition('.')[2]}.*']",
        )
    tables = [decoder.name(decoder.embedding), decoder.name(decoder.model.get_output_embeddings())]
    names = [*(layer.name for layer in layers), *tables]
    idle = [pattern for pattern in config.keep if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise StageError(
            f"keep: no layer is called {', '.join(map(repr, idle))}.",
            expected=f"patterns of names such as {names[0]!r}; * stands for anything",
        )
    embedding, head = tables
    # By default the table stays in float with its head.
    quantizes_table = config.chooses_tables or config.embedding_bits not in (None, FLOAT_BITS)
    if decoder.tied and quantizes_table and skip_reason(config.keep, head) and not skip_reason(config.keep, embedding):
        raise ModelError(
            f"keep: {head} has the weights of {embedding}, which is not kept.",
            where="keep",
            expected="both or neither, since this model's head is tied to its embedding",
            hint=f"name {embedding} too, or set embedding_bits: 16",
        )
    problems = [problem for layer in layers if layer.bits for problem in _problems(layer)]
    if problems:
        size = config.group_size
        raise ModelError(
            f"{len(problems)} layers do not fit the GPTQ format with group_size {size}:\n  {_some(problems)}",
            where=str(decoder.checkpoint.folder),
            expected="sides that are multiples of 32, and inputs that the group size divides",
            hint="choose a group_size that divides all widths, or leave the layers alone: keep: ['NAME', ...]",
        )
    if not any(layer.bits for layer in layers):
        raise StageError("No layer is left to quantize.", expected="torch.nn.Linear layers that `keep` doesn't name")
    return plan


def with_bits(plan: Sequence[Sequence[Layer]], bits: Mapping[str, int]) -> tuple[tuple[Layer, ...], ...]:
    """Return the plan with other bits for the named layers."""
    return tuple(tuple(replace(layer, bits=bits.get(layer.name, layer.bits)) for layer in block) for block in plan)


def about_starved(layers: Sequence[Layer], minimum: int) -> str:
    """Return a line on the experts that were sent too few tokens, or an empty text."""
    experts = {layer.name.rpartition(".")[0]: layer for layer in layers if layer.tokens is not None}
    starved = [f"{name} ({layer.tokens})" for name, layer in experts.items() if layer.starved]
    if not starved:
        return ""
    more = f" and {len(starved) - _SHOWN} more" if len(starved) > _SHOWN else ""
    return (
        f"starved: {len(starved)} of {len(experts)} experts received fewer than {minimum} tokens of the calibration "
        f"text; all tokens of their layer supplement them: {', '.join(starved[:_SHOWN])}{more}"
    )


def skip_reason(patterns: Sequence[str], name: str) -> str:
    """Why a layer is left alone, or nothing."""
    pattern = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
    return "" if pattern is None else f"kept by the pattern {pattern!r}"


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Return the linear layers of a block by full name, in the order of the module."""
    return {name: part for name, part in block.named_modules(prefix=prefix) if isinstance(part, nn.Linear)}


def _block_layers(decoder: BlockwiseModel, index: int, config: Quantization) -> tuple[Layer, ...]:
    block, prefix = decoder.blocks[index], f"{decoder.prefix}.{index}"
    block_layers, routing = [], router_layers(block, prefix)
    for name, part in linears(block, prefix).items():
        rows, columns = part.out_features, part.in_features
        reason = skip_reason(config.keep, name) or ("kept: it is the router of experts" if name in routing else "")
        # A small matrix, such as one of low rank, may be left alone; a large one has to fit.
        is_small = min(rows, columns) < _NARROW and 2 * min(rows, columns) <= max(rows, columns)
        if not reason and is_small and not fits(rows, columns):
            reason = f"narrow: {rows} x {columns} is no multiple of 32"
        if reason:
            block_layers.append(Layer(name, rows, columns, None, why=reason))
        else:
            size = columns if config.group_size == -1 else config.group_size
            block_layers.append(Layer(name, rows, columns, config.bits, size))
    # Parameters with two sides or more that are no linear layer's.
    for name, part in block.named_modules(prefix=prefix):
        for leaf, parameter in part.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not isinstance(part, nn.Linear):
                columns, full_name = parameter.shape[-1], f"{name}.{leaf}"
                why = f"not a torch.nn.Linear: {leaf} of {type(part).__name__} {list(parameter.shape)}"
                why = skip_reason(config.keep, full_name) or why
                block_layers.append(Layer(full_name, parameter.numel() // columns, columns, None, why=why))
    return tuple(block_layers)


def _some(lines: Sequence[str]) -> str:
    """Return the first lines of a list, and how many more there are."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n  ".join([*lines[:_SHOWN], *more])


def _problems(layer: Layer) -> Iterator[str]:
    """Yield why the format cannot hold a layer."""
    assert layer.group_size is not None
    size = f"{layer.name} [{layer.rows}, {layer.columns}]"
    if not fits(layer.rows, layer.columns):
        yield f"{size}: both sides must be multiples of 32"
    if layer.columns % layer.group_size:
        divisors = [group for group in (16, 32, 64, 128, 256, 512, 1024) if layer.columns % group == 0]
        named = f", {', '.join(map(str, divisors))} would" if divisors else ""
        yield f"{size}: {layer.group_size} does not divide {layer.columns}{named}"
