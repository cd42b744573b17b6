"""The graph of a decoder or an encoder without its weights, traced through transformers' own modules.

Prompt and single tokens in one graph: keys and values of earlier tokens, and the states of convolutions and
recurrences, come in and go out. A trace takes seconds for each block, so that only as many are traced as differ from
each other; the others are written as these are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn

from compress.formats.onnx.decoder import apply_patches
from compress.formats.onnx.decoder.attention_calls import AttentionCall
from compress.formats.onnx.decoder.caches import PAST, fill_cache, layer_index, present, record_updates, sample_states
from compress.formats.onnx.decoder.node_groups import NodeGroups, group_nodes
from compress.formats.onnx.decoder.traced_parts import MASK, TracedPart, decoder_of_embeddings, decoder_only
from compress.formats.onnx.decoder.tracing_patches import Placeholder, TracingPatches, lengths_of
from compress.formats.silence import silence
from compress.formats.tracing import as_written, lean_tracing
from compress.models.checkpoint import Checkpoint
from compress.models.meta_model import build_on_meta, reads_images
from compress.models.quantized_module import build_empty_module
from compress.runtimes.image_answers import refuse_unfollowed
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEW = 3
"""New tokens of a trace: no two axes alike, and none of 1, which would be frozen."""
_REHEARSED = 24
_OF_WEIGHTS = ("quantization_config", "dtype", "transformers_version", "_name_or_path")
"""What a config says of the weights in its folder, and not of the model."""
_MOST_KEPT = 4
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a forward pass, or torch.export, may end in."""


@dataclass(frozen=True)
class TracedBlock:
    """A block by its name; ``kind``: the first that is like this one."""

    prefix: str
    kind: int


@dataclass(frozen=True)
class Trace:
    """``program``: a graph whose weights are names (`patches`), of the first blocks; ``blocks``: all of the model's.

    ``states``: each tensor of the cache with its shape, of which rows and, for keys and values, length are arbitrary.
    ``created_tables``: tables that the model makes by itself, of which a checkpoint may hold none. ``unfused``: why attention is
    not one operator, or nothing.
    """

    part: TracedPart
    program: ir.Model
    model: PreTrainedModel
    blocks: Sequence[TracedBlock]
    traced: int
    groups: NodeGroups
    states: Mapping[str, tuple[int, ...]]
    calls: Sequence[AttentionCall]
    created_tables: Mapping[str, torch.Tensor]
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
            model = _Rehearsal(checkpoint, _decoder).model
            if reads_images(model.config):
                from compress.formats.onnx.decoder.vision_encoder import check_vision_encoder

                check_vision_encoder(folder, model)
        _WRITABLE[key] = reads_images(model.config)
    if _WRITABLE[key]:
        refuse_unfollowed(folder)


def _decoder(model: Any) -> TracedPart:
    return decoder_of_embeddings(model) if reads_images(model.config) else decoder_only(model)


def trace_part(checkpoint: Checkpoint, part: Callable[[Any], TracedPart], fused: bool | None = None) -> Trace:
    """Trace a part of the model of ``checkpoint``. ``fused``: attention as one operator, by default where it can be.

    A trace depends on the config alone; the last are kept. Raises `ModelError` for a model that cannot be traced.
    """
    key = json.dumps([_of_model(checkpoint), part.__name__, fused])
    if key not in _KEPT:
        while len(_KEPT) >= _MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _traced(checkpoint, part, fused)
    return _KEPT[key]


def _traced(
    checkpoint: Checkpoint, part: Callable[[Any], TracedPart], fused: bool | None, whole: bool = False
) -> Trace:
    """``whole``: every block, whether or not it is like another."""
    with _refusing(checkpoint), silence("prints"), lean_tracing(), torch.no_grad():
        found = _Rehearsal(checkpoint, part)
        blocks = _describe(found)
        traced = len(found.blocks) if whole else max(block.kind for block in blocks) + 1
        while len(found.blocks) > traced:
            del found.blocks[-1]
        unfused = _unfused(found) if fused is not False else "it is traced as it is"
        if unfused and not found.part.decoder_only:
            raise ValueError(f"attention cannot be one operator: {unfused}")
        found.patches.fused = not unfused
        states = sample_states(found.cache, not unfused)
        with as_written(found.model):
            program = _trace(found, {name: state for name, state in states.items() if layer_index(name) < traced})
    prefixes = [block.prefix for block in blocks[:traced]]
    groups = group_nodes(program.graph, prefixes, traced < len(blocks))
    if groups is None:
        return _traced(checkpoint, part, fused, whole=True)
    shapes = {name: tuple(state.shape) for name, state in states.items()}
    calls = list(found.patches.calls.values())
    return Trace(found.part, program, found.model, blocks, traced, groups, shapes, calls, found.created_tables, unfused)


_KEPT: dict[str, Trace] = {}
_WRITABLE: dict[str, bool] = {}
"""Whether it reads images, of each model that can be written."""


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
            expected="a model whose forward pass torch.export can follow",
            hint="ship it as a GPTQ checkpoint or GGUF instead",
        ) from error


class _Rehearsal:
    """A model without weights that has been run once on arbitrary numbers, what was recorded, and its cache."""

    def __init__(self, checkpoint: Checkpoint, part: Callable[[Any], TracedPart] = decoder_only) -> None:
        self.model = build_empty_module(checkpoint, build_on_meta).eval()
        # What routers answer is for their training alone.
        self.model.config.output_router_logits = False
        self.part = part(self.model)
        self.created_tables = {
            f"{name}.weight": module.create_weight()
            for name, module in self.model.named_modules()
            if hasattr(module, "create_weight")
        }
        self.patches = TracingPatches(self.part.decoder_only, self.part.cached, not self.part.takes_positions)
        apply_patches.replace_parameters(self.model, self.patches)
        self.prefix, self.blocks = _blocks(self.model, self.part.root(self.model))
        self.cache = self.part.cache(self.model, len(self.blocks))
        slots = record_updates(self.cache)
        with apply_patches.patched(self.model, self.patches):
            self.part.call(self.model, self.cache, self.part.sample(_REHEARSED, 0))
        self.patches.norms = apply_patches.find_rms_norms(self.model)
        reached = {call.layer for call in self.patches.calls.values()}
        self.missed = sorted(slot.name for slot in slots if slot.new and slot.name not in reached)


def _blocks(model: nn.Module, root: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the blocks below ``root``, the longest of the outermost, and its name."""
    (place,) = (name for name, part in model.named_modules() if part is root)
    lists = {name: part for name, part in root.named_modules(prefix=place) if isinstance(part, nn.ModuleList)}
    outermost = {name: part for name, part in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
    name = max(outermost, key=lambda one: len(outermost[one]), default=None)
    if name is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks.", expected="one torch.nn.ModuleList of blocks")
    return name, outermost[name]


def _unfused(found: _Rehearsal) -> str:
    calls = found.patches.calls.values()
    reasons = [f"{call.module}: {call.problem}" for call in calls if call.problem]
    if not calls:
        reasons = ["it has no attention that goes through transformers' interface"]
    reasons += [f"the attention of layer {layer} goes past transformers' interface" for layer in found.missed]
    return next(iter(reasons), "")


def _describe(found: _Rehearsal) -> list[TracedBlock]:
    seen: list[Any] = []
    blocks = []
    for index, block in enumerate(found.blocks):
        name = f"{found.prefix}.{index}"
        calls = [call for call in found.patches.calls.values() if call.module.startswith(f"{name}.")]
        likeness = [*_likeness(block), *(_likeness_of_call(call, name) for call in calls)]
        blocks.append(TracedBlock(name, seen.index(likeness) if likeness in seen else index))
        seen.append(likeness)
    return blocks


def _likeness(block: nn.Module) -> Iterator[Any]:
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


def _likeness_of_call(call: AttentionCall, name: str) -> Any:
    return replace(call, module=call.module.removeprefix(name), layer=call.layer.rstrip("0123456789"))


class _OneGraph(nn.Module):
    """What is traced: inputs and cache in, output and cache out, all flat."""

    def __init__(self, found: _Rehearsal) -> None:
        super().__init__()
        self.model, self._found = found.model, found

    def forward(self, **given: torch.Tensor) -> dict[str, Any]:
        patches, part = self._found.patches, self._found.part
        past = {name: given.pop(name) for name in list(given) if name.startswith("past_")}
        cache = part.cache(self.model, len(self._found.blocks))
        patches.padding = part.padding(given)
        mask = given[MASK] if part.decoder_only else None
        if mask is not None and patches.fused:
            patches.lengths = lengths_of(mask)
        fill_cache(cache, past, patches, None if mask is None else mask.shape[1] - given[part.tokens].shape[1])
        outputs = {part.output: part.call(self.model, cache, given)}
        return outputs | {"present" + name.removeprefix("past"): present(name, cache) for name in past}


def _trace(found: _Rehearsal, states: Mapping[str, torch.Tensor]) -> ir.Model:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    patches = found.patches
    # Recurrences go by chunks; with more than one of them their number is no constant.
    new = _NEW + max(getattr(part, "chunk_size", 0) or 0 for part in found.model.modules())
    inputs = {**found.part.sample(new, PAST), **states}
    patches.tracing = True
    for index, block in enumerate(found.blocks):
        block.forward = _marked(patches, block.forward, index)
    with apply_patches.patched(found.model, patches):
        program, _ = OnnxExporter().export_program(_OneGraph(found).eval(), inputs, OnnxConfig(dynamic=True))
    return program


def _marked(patches: TracingPatches, forward: Any, index: int) -> Any:
    def marked(*given: Any, **named: Any) -> Any:
        if given:
            given = (patches.mark(Placeholder.BLOCK_INPUT, given[0], index), *given[1:])
        else:
            named["hidden_states"] = patches.mark(Placeholder.BLOCK_INPUT, named["hidden_states"], index)
        found = forward(*given, **named)
        if not isinstance(found, tuple):
            return patches.mark(Placeholder.BLOCK_OUTPUT, found, index)
        # What else a block gives, such as T5's bias of positions, later ones are given as it is.
        others = [
            patches.mark(Placeholder.SHARED_OUTPUT, one, index) if isinstance(one, torch.Tensor) else one
            for one in found[1:]
        ]
        return (patches.mark(Placeholder.BLOCK_OUTPUT, found[0], index), *others)

    return marked
