"""Tracing of a decoder or an encoder without its weights through transformers' own modules.

Prompt and single tokens share one graph: keys and values of earlier tokens, and the states of convolutions and
recurrences, are inputs and outputs. A trace takes seconds for each block, so only blocks that differ from each
other are traced; the others are written from these.
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

from compress.formats.generation.image_text import refuse_unfollowed
from compress.formats.onnx.decoder import apply_patches
from compress.formats.onnx.decoder.attention_calls import AttentionCall
from compress.formats.onnx.decoder.caches import PAST, fill_cache, layer_index, present, record_updates, sample_states
from compress.formats.onnx.decoder.rewrites import NodeGroups, group_nodes
from compress.formats.onnx.decoder.traced_parts import MASK, TracedPart, decoder_of_embeddings, decoder_only
from compress.formats.onnx.decoder.tracing_patches import Placeholder, TracingPatches, lengths_of
from compress.formats.quiet_output import suppress_output
from compress.formats.tracing import lean_tracing, with_traceable_builtins
from compress.models.checkpoint import Checkpoint
from compress.models.meta_model import build_on_meta, reads_images
from compress.models.quantized_module import build_empty_module
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEW = 3
"""Number of new tokens in a trace. No two axes have the same size, and none has size 1, which would be frozen."""
_DRY_RUN_TOKENS = 24
_OF_WEIGHTS = ("quantization_config", "dtype", "transformers_version", "_name_or_path")
"""Entries of a config that describe the weights in its folder and not the model."""
_OF_ONE_BLOCK = ("compress_module_name", "layer_idx", "layer_index", "layer_id", "idx", "training")
"""Attributes of modules that depend on the block."""
_MOST_KEPT = 4
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""Exceptions of a forward pass or torch.export."""


@dataclass(frozen=True)
class TracedBlock:
    """A block by its name; ``kind`` is the index of the first block that is equal to it."""

    prefix: str
    kind: int


@dataclass(frozen=True)
class Trace:
    """A graph ``program`` of the first blocks with placeholders for weights, and all ``blocks`` of the model.

    ``states`` holds the shape of each tensor of the cache; the number of rows and, for keys and values, the length are
    arbitrary. ``created_tables`` are tables that the model computes and that a checkpoint may lack. ``unfused`` is the
    reason why attention is not one operator, or "".
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
        """Return whether other state than keys and values is carried from token to token."""
        return any(not name.startswith(("past_key_", "past_value_")) for name in self.states)


def check_writable(folder: Path) -> None:
    """Raise `ModelError` for a language model that cannot be built or run without its weights.

    Successful checks are remembered, because a run checks each of its targets and stages.
    """
    checkpoint = Checkpoint(folder)
    if (key := _of_model(checkpoint)) not in _WRITABLE:
        # The dry run fails where tracing would, and takes a fraction of the time.
        with _model_errors(checkpoint), torch.no_grad():
            model = _DryRun(
                checkpoint,
                lambda model: decoder_of_embeddings(model) if reads_images(model.config) else decoder_only(model),
            ).model
            if reads_images(model.config):
                from compress.formats.onnx.decoder.traced_parts import check_vision_encoder

                check_vision_encoder(folder, model)
        _WRITABLE[key] = reads_images(model.config)
    if _WRITABLE[key]:
        refuse_unfollowed(folder)


def trace_part(checkpoint: Checkpoint, part: Callable[[Any], TracedPart], fused: bool | None = None) -> Trace:
    """Trace a part of the model of ``checkpoint``. ``fused``: attention as one operator, by default where possible.

    A trace depends only on the config, so the last ones are cached. Raises `ModelError` if tracing fails.
    """
    key = json.dumps([_of_model(checkpoint), part.__name__, fused])
    if key not in _TRACES_BY_KEY:
        # The oldest trace is dropped.
        while len(_TRACES_BY_KEY) >= _MOST_KEPT:
            del _TRACES_BY_KEY[next(iter(_TRACES_BY_KEY))]
        _TRACES_BY_KEY[key] = _traced(checkpoint, part, fused)
    return _TRACES_BY_KEY[key]


def _traced(
    checkpoint: Checkpoint, part: Callable[[Any], TracedPart], fused: bool | None, every_block: bool = False
) -> Trace:
    """Trace a part; ``every_block`` traces all blocks, including equal ones."""
    with _model_errors(checkpoint), suppress_output("prints"), lean_tracing(), torch.no_grad():
        dry_run = _DryRun(checkpoint, part)
        blocks = _describe(dry_run)
        # Blocks after the last one that differs from earlier ones are removed before tracing.
        traced = len(dry_run.blocks) if every_block else max(block.kind for block in blocks) + 1
        while len(dry_run.blocks) > traced:
            del dry_run.blocks[-1]
        # Cross attention exists as an operator only, so an encoder-decoder cannot fall back.
        unfused = dry_run.unfused if fused is not False else "the traced attention is used"
        if unfused and not dry_run.part.decoder_only:
            raise ValueError(f"attention cannot be one operator: {unfused}")
        dry_run.patches.fused = not unfused
        states = sample_states(dry_run.cache, not unfused)
        with with_traceable_builtins(dry_run.model):
            program = _trace(dry_run, {name: state for name, state in states.items() if layer_index(name) < traced})
    prefixes = [block.prefix for block in blocks[:traced]]
    groups = group_nodes(program.graph, prefixes, traced < len(blocks))
    if groups is None:
        # Blocks that share more than hidden states cannot stand for others.
        return _traced(checkpoint, part, fused, every_block=True)
    shapes = {name: tuple(state.shape) for name, state in states.items()}
    calls = list(dry_run.patches.calls.values())
    return Trace(
        dry_run.part, program, dry_run.model, blocks, traced, groups, shapes, calls, dry_run.created_tables, unfused
    )


_TRACES_BY_KEY: dict[str, Trace] = {}
_WRITABLE: dict[str, bool] = {}
"""Whether each model that can be written reads images."""


def _of_model(checkpoint: Checkpoint) -> str:
    """Return the entries of a config that describe the model itself, as a key."""
    return json.dumps({k: v for k, v in checkpoint.config.items() if k not in _OF_WEIGHTS}, sort_keys=True)


@contextmanager
def _model_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn any failure inside transformers or torch into a `ModelError`."""
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


class _DryRun:
    """Model without weights after one forward pass on arbitrary numbers, with its attention calls and cache.

    ``unfused`` is the reason why attention cannot be one operator, or "".
    """

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
        # The name and the list of the blocks below ``root``: the longest of the outermost module lists.
        root = self.part.root(self.model)
        (root_name,) = (name for name, part in self.model.named_modules() if part is root)
        lists = {name: part for name, part in root.named_modules(prefix=root_name) if isinstance(part, nn.ModuleList)}
        outermost = {name: part for name, part in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
        name = max(outermost, key=lambda name: len(outermost[name]), default=None)
        if name is None:
            raise ModelError(
                f"{type(self.model).__name__} has no list of blocks.", expected="one torch.nn.ModuleList of blocks"
            )
        self.prefix, self.blocks = (name, outermost[name])
        self.cache = self.part.cache(self.model, len(self.blocks))
        slots = record_updates(self.cache)
        with apply_patches.patched(self.model, self.patches):
            self.part.call(self.model, self.cache, self.part.sample(_DRY_RUN_TOKENS, 0))
        self.patches.norms = apply_patches.find_rms_norms(self.model)
        # Attention is one operator only if every layer of the cache has a call that the operator computes.
        calls = self.patches.calls.values()
        missed = {slot.name for slot in slots if slot.new} - {call.layer for call in calls}
        reasons = [f"{call.module}: {call.problem}" for call in calls if call.problem]
        reasons += [] if calls else ["it has no attention with transformers' interface"]
        reasons += [f"the attention of layer {layer} does not use transformers' interface" for layer in sorted(missed)]
        self.unfused = next(iter(reasons), "")


def _describe(dry_run: _DryRun) -> list[TracedBlock]:
    """Return every block with the first block that is equal to it."""
    likenesses: list[Any] = []
    blocks = []
    for index, block in enumerate(dry_run.blocks):
        name = f"{dry_run.prefix}.{index}"
        calls = [call for call in dry_run.patches.calls.values() if call.module.startswith(f"{name}.")]
        # All properties by which the graphs of two blocks could differ, except the values of their weights.
        likeness: list[object] = []
        for path, module in block.named_modules():
            plain = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, int | float | str | bool | None | tuple) and key not in _OF_ONE_BLOCK
            }
            buffers = [(leaf, value.tolist()) for leaf, value in module.named_buffers(recurse=False)]
            likeness.append((path, type(module).__name__, plain, module.compress_shapes, buffers))
        # An attention call without the names that depend on its block.
        for call in calls:
            layer = call.layer.rstrip("0123456789")
            likeness.append(replace(call, module=call.module.removeprefix(name), layer=layer))
        blocks.append(TracedBlock(name, likenesses.index(likeness) if likeness in likenesses else index))
        likenesses.append(likeness)
    return blocks


class _OneGraph(nn.Module):
    """Module that is traced: inputs and cache in, output and cache out, all flat."""

    def __init__(self, dry_run: _DryRun) -> None:
        super().__init__()
        self.model, self._dry_run = dry_run.model, dry_run

    def forward(self, **inputs: torch.Tensor) -> dict[str, Any]:
        patches, part = self._dry_run.patches, self._dry_run.part
        past = {name: inputs.pop(name) for name in list(inputs) if name.startswith("past_")}
        cache = part.cache(self.model, len(self._dry_run.blocks))
        patches.padding = part.padding(inputs)
        mask = inputs[MASK] if part.decoder_only else None
        # All layers share the lengths that the attention operator needs.
        if mask is not None and patches.fused:
            patches.lengths = lengths_of(mask)
        fill_cache(cache, past, patches, None if mask is None else mask.shape[1] - inputs[part.tokens].shape[1])
        outputs = {part.output: part.call(self.model, cache, inputs)}
        return outputs | {"present" + name.removeprefix("past"): present(name, cache) for name in past}


def _trace(dry_run: _DryRun, states: Mapping[str, torch.Tensor]) -> ir.Model:
    """Export the graph with dynamic axes."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    patches = dry_run.patches
    # Recurrences go by chunks; with more than one of them their number is no constant.
    new = _NEW + max(getattr(part, "chunk_size", 0) or 0 for part in dry_run.model.modules())
    inputs = {**dry_run.part.sample(new, PAST), **states}
    patches.tracing = True
    for index, block in enumerate(dry_run.blocks):
        block.forward = _with_markers(patches, block.forward, index)
    with apply_patches.patched(dry_run.model, patches):
        program, _ = OnnxExporter().export_program(_OneGraph(dry_run).eval(), inputs, OnnxConfig(dynamic=True))
    return program


def _with_markers(patches: TracingPatches, forward: Any, index: int) -> Any:
    """Return a block's forward function with placeholders at its input and outputs."""

    def marked(*arguments: Any, **named: Any) -> Any:
        if arguments:
            arguments = (patches.mark(Placeholder.BLOCK_INPUT, arguments[0], index), *arguments[1:])
        else:
            named["hidden_states"] = patches.mark(Placeholder.BLOCK_INPUT, named["hidden_states"], index)
        result = forward(*arguments, **named)
        if not isinstance(result, tuple):
            return patches.mark(Placeholder.BLOCK_OUTPUT, result, index)
        # What else a block gives, such as T5's bias of positions, later ones are arguments as it is.
        others = [
            patches.mark(Placeholder.SHARED_OUTPUT, output, index) if isinstance(output, torch.Tensor) else output
            for output in result[1:]
        ]
        return (patches.mark(Placeholder.BLOCK_OUTPUT, result[0], index), *others)

    return marked
