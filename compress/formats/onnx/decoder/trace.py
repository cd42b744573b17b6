"""The graph of a decoder without its weights, traced through transformers' own modules.

Prompt and single tokens in one graph: keys and values of earlier tokens, and the states of convolutions and
recurrences, come in and go out. A trace takes seconds for each block, so that only as many are traced as differ from
each other; the others are written as these are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.quantized_module import empty_module
from compress.errors import ModelError, first_line
from compress.formats.onnx.decoder import interfaces
from compress.formats.onnx.decoder import plug as plugs
from compress.formats.onnx.decoder.caches import (
    KINDS,
    PAST,
    call_model,
    holds_keys,
    new_cache,
    noting,
    put_keys,
    put_states,
    run_model,
    sample_states,
)
from compress.formats.onnx.decoder.plug import Call, Plug
from compress.formats.silence import silence
from compress.formats.tracing import lean_tracing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEW, _ROWS = 3, 2
"""New tokens of a trace, and its rows: no two axes alike, and none of 1, which would be frozen."""
_REHEARSED = 24
_OF_WEIGHTS = ("quantization_config", "dtype", "transformers_version", "_name_or_path")
"""What a config says of the weights in its folder, and not of the model."""
_MOST_KEPT = 4
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What a forward pass, or torch.export, may end in."""


@dataclass(frozen=True)
class Block:
    """``kind``: the first block that is like this one; ``calls`` of its attention."""

    prefix: str
    kind: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Trace:
    """``program``: a graph whose weights are names (`plug`), of the first blocks; ``blocks``: all of the model's.

    ``states``: each tensor of the cache with its shape, of which rows and, for keys and values, length are arbitrary.
    ``unfused``: why attention is not one operator, or nothing.
    """

    program: ir.Model
    model: PreTrainedModel
    blocks: Sequence[Block]
    traced: int
    states: Mapping[str, tuple[int, ...]]
    calls: Sequence[Call]
    unfused: str = ""

    @property
    def keeps_states(self) -> bool:
        """Whether something else than keys and values goes from token to token."""
        return any(not name.startswith(("past_key_", "past_value_")) for name in self.states)


def check_writable(folder: Path) -> None:
    """Raise `ModelError` for a language model that cannot be built, or run without its weights.

    A model that could be is not tried again: a run asks for each of its targets and stages.
    """
    checkpoint = Checkpoint(folder)
    if (key := _of_model(checkpoint)) not in _WRITABLE:
        with _refusing(checkpoint), torch.no_grad():
            _Rehearsal(checkpoint)
        _WRITABLE.add(key)


def trace_decoder(checkpoint: Checkpoint, fused: bool | None = None, whole: bool = False) -> Trace:
    """Trace the model of ``checkpoint``. ``fused``: attention as one operator, by default where it can be.

    ``whole``: every block, whether or not it is like another. A trace depends on the config alone; the last are kept.
    Raises `ModelError` for a model that cannot be traced.
    """
    key = json.dumps([_of_model(checkpoint), fused, whole])
    if key not in _KEPT:
        while len(_KEPT) >= _MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _traced(checkpoint, fused, whole)
    return _KEPT[key]


def _traced(checkpoint: Checkpoint, fused: bool | None, whole: bool) -> Trace:
    with _refusing(checkpoint), silence("prints"), lean_tracing(), torch.no_grad():
        found = _Rehearsal(checkpoint)
        described = _describe(found.prefix, found.blocks, found.plug)
        traced = len(found.blocks) if whole else max(block.kind for block in described) + 1
        while len(found.blocks) > traced:
            del found.blocks[-1]
        unfused = _unfused(found.plug) if fused is not False else "it is traced as it is"
        found.plug.fused = not unfused
        states = sample_states(found.cache, found.plug)
        program = _trace(found, {name: state for name, state in states.items() if int(name.split("_")[2]) < traced})
    shapes = {name: tuple(state.shape) for name, state in states.items()}
    calls = list(found.plug.calls.values())
    return Trace(program, found.model, described, traced, shapes, calls, unfused)


_KEPT: dict[str, Trace] = {}
_WRITABLE: set[str] = set()


def _of_model(checkpoint: Checkpoint) -> str:
    """What a config says of the model itself."""
    return json.dumps({k: v for k, v in checkpoint.config.items() if k not in _OF_WEIGHTS}, sort_keys=True)


@contextmanager
def _refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of any failure inside transformers or torch that the model cannot be traced."""
    try:
        yield
    except ModelError:
        raise
    except _FAILURES as error:
        name = next(iter(checkpoint.config.get("architectures") or ["The model"]))
        raise ModelError(
            f"{name} cannot be written as an ONNX decoder: {first_line(error)}",
            where=str(checkpoint.folder / "config.json"),
            expected="a decoder whose forward pass torch.export can follow",
            mend="ship it as a GPTQ checkpoint or GGUF instead",
        ) from error


class _Rehearsal:
    """A model without weights that has been run once on arbitrary numbers, what was recorded, and its cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        interfaces.register()
        self.model = empty_module(checkpoint).eval()
        # What routers answer is for their training alone.
        self.model.config.output_router_logits = False
        interfaces.prepare(self.model)
        self.prefix, self.blocks = _blocks(self.model)
        self.plug = Plug()
        interfaces.set_attention(self.model, interfaces.REHEARSED)
        self.cache = new_cache(self.model)
        for index, layer in enumerate(self.cache.layers):
            if holds_keys(layer):
                layer.update = MethodType(noting(self.plug, index, layer.update), layer)
        with interfaces.plugged(self.model, self.plug):
            run_model(self.model, self.cache, torch.zeros(_ROWS, _REHEARSED, dtype=torch.long), 0)
            self.plug.norms = interfaces.plain_norms(self.model)
        reached = {call.layer for call in self.plug.calls.values()}
        self.plug.missed = sorted(set(self.plug.updated.values()) - reached)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a decoder's blocks, the longest of the outermost, and its name."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = {name: part for name, part in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
    name = max(outermost, key=lambda one: len(outermost[one]), default=None)
    if name is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks.", expected="one torch.nn.ModuleList of blocks")
    return name, outermost[name]


def _unfused(plug: Plug) -> str:
    if not plug.calls:
        return "it has no attention that goes through transformers' interface"
    problems = [call for call in plug.calls.values() if call.problem]
    if problems:
        return f"{problems[0].module}: {problems[0].problem}"
    return f"the attention of layer {plug.missed[0]} goes past transformers' interface" if plug.missed else ""


def _describe(prefix: str, blocks: nn.ModuleList, plug: Plug) -> list[Block]:
    seen: list[Any] = []
    described = []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        calls = tuple(call for call in plug.calls.values() if call.module.startswith(f"{name}."))
        likeness = [*_likeness(block, name), *(_likeness_of_call(call, name) for call in calls)]
        kind = seen.index(likeness) if likeness in seen else index
        seen.append(likeness)
        described.append(Block(name, kind, calls))
    return described


def _likeness(block: nn.Module, name: str) -> Iterator[Any]:
    """Everything by which the graphs of two blocks could differ beside the numbers of their weights."""
    for path, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool | None | tuple)
            and key not in ("compress_name", "layer_idx", "layer_index", "layer_id", "idx", "training")
        }
        buffers = [(leaf, value.tolist()) for leaf, value in module.named_buffers(recurse=False)]
        yield path, type(module).__name__, plain, module.compress_shapes, buffers


def _likeness_of_call(call: Call, name: str) -> Any:
    return replace(call, module=call.module.removeprefix(name), layer=0)


class _OneGraph(nn.Module):
    """What is traced: ids, mask and cache in, logits and cache out, all flat."""

    def __init__(self, model: Any, plug: Plug) -> None:
        super().__init__()
        self.model, self._plug = model, plug

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **past: torch.Tensor) -> dict[str, Any]:
        plug = self._plug
        plug.clear()
        cache = new_cache(self.model)
        new = input_ids.shape[1]
        if plug.fused:
            plug.lengths = plugs.lengths_of(attention_mask)
        for index, layer in enumerate(cache.layers):
            put_states(layer, index, past)
            if f"past_key_{index}" in past:
                pair = past[f"past_key_{index}"], past[f"past_value_{index}"]
                put_keys(layer, pair, plug, index, attention_mask.shape[1] - new)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, attention_mask.shape[1] - new :]
        logits = call_model(self.model, cache, input_ids, attention_mask, positions)
        outputs = {"logits": logits}
        for name in past:
            outputs["present" + name.removeprefix("past")] = self._present(name, cache)
        return outputs

    def _present(self, name: str, cache: Any) -> torch.Tensor:
        kind, index, *number = name.removeprefix("past_").split("_")
        layer, slot = cache.layers[int(index)], self._plug.slots.get(int(index))
        if kind in KINDS:
            state: torch.Tensor = getattr(layer, f"{kind}_states")[int(number[0])]
            return state
        pair: Any = (layer.keys, layer.values) if slot is None else slot.present
        found: torch.Tensor = pair[kind == "value"]
        return found


def _trace(found: _Rehearsal, states: Mapping[str, torch.Tensor]) -> ir.Model:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model, plug = found.model, found.plug
    interfaces.set_attention(model, interfaces.TRACED if plug.fused else "eager")
    # Recurrences go by chunks; with more than one of them their number is no constant.
    new = _NEW + max(getattr(part, "chunk_size", 0) or 0 for part in model.modules())
    total = PAST + new
    inputs = {
        "input_ids": torch.ones(_ROWS, new, dtype=torch.long),
        "attention_mask": torch.ones(_ROWS, total, dtype=torch.long),
        **states,
    }
    plug.tracing = True
    for index, block in enumerate(found.blocks):
        block.forward = _marked(plug, block.forward, index)
    with interfaces.plugged(model, plug):
        program, _ = OnnxExporter().export_program(_OneGraph(model, plug).eval(), inputs, OnnxConfig(dynamic=True))
    return program


def _marked(plug: Plug, forward: Any, index: int) -> Any:
    def marked(*given: Any, **named: Any) -> Any:
        if given:
            given = (plug.mark(plugs.ENTER, given[0], index), *given[1:])
        else:
            named["hidden_states"] = plug.mark(plugs.ENTER, named["hidden_states"], index)
        found = forward(*given, **named)
        if isinstance(found, tuple):
            return (plug.mark(plugs.LEAVE, found[0], index), *found[1:])
        return plug.mark(plugs.LEAVE, found, index)

    return marked
