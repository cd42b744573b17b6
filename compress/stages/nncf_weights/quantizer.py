"""NNCF's weight compression of the whole torch model; what it chose is kept in our own checkpoint."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.folder_checks import refuse_quantized
from compress.models.gptq_layout import pack_layer
from compress.models.quantized_module import load_quantized_module
from compress.numerics.integer_grid import QuantizedWeight
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.blockwise.layers import Layer, plan_layers
from compress.stages.blockwise.resume import BlockCache, EmbeddingTables, keep_tables, plan_tables
from compress.stages.blockwise.write import Result
from compress.stages.gptq.settings import FLOAT_BITS, NncfOptions
from compress.utils.errors import StageError
from compress.utils.progress import Progress
from compress.utils.storage import storage_errors

_SAID = ("mode", "awq", "scale_estimation", "all_layers")
"""Options that the checkpoint names."""
_NAMED = 3


def quantize_with_nncf(checkpoint: Checkpoint, options: NncfOptions, context: Context) -> QuantizedCheckpoint:
    """Write the checkpoint in GPTQ format into the scratch folder. Raises `CompressError`."""
    refuse_quantized(checkpoint.folder)
    decoder = build_blockwise_model(checkpoint)
    plan = plan_layers(decoder, options.equivalent)
    tables = plan_tables(decoder, options.equivalent, None)
    ids = calibration_sequences(context, checkpoint, options.samples, options.sequence_length)
    float_names = [layer.name for block in plan for layer in block if layer.bits is None]
    float_names += [table.name for table in tables if table.why.startswith("kept")]
    context.progress.note(f"nncf: {len(ids)} windows of text; the whole model is in memory, in float32")
    compressed = _compress(checkpoint, options, ids, float_names, context.progress)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        return _Chosen(decoder, options, plan, tables, compressed, context).keep()


def _compress(
    checkpoint: Checkpoint, options: NncfOptions, ids: torch.Tensor, kept: Sequence[str], progress: Progress
) -> Compressed:
    """Run NNCF on the model of ``checkpoint`` and read what it left. Raises `StageError` with NNCF's own words."""
    import nncf

    module = load_quantized_module(checkpoint)
    module.config.use_cache = False
    feeds = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in ids]
    refused = (
        *(nncf.InternalError, nncf.InvalidGroupSizeError, nncf.ParameterNotSupportedError),
        *(nncf.UnsupportedBackendError, nncf.UnsupportedModelError, nncf.ValidationError),
    )
    try:
        with _told_to(progress):
            nncf.compress_weights(
                module,
                mode=nncf.CompressWeightsMode(options.mode),
                ratio=1.0,
                group_size=options.group_size,
                all_layers=options.all_layers,
                dataset=nncf.Dataset(feeds),
                subset_size=len(feeds),
                awq=options.awq,
                scale_estimation=options.scale_estimation,
                backup_mode=nncf.BackupMode.INT8_SYM,
                # What is no linear layer is listed with its tensor's name.
                ignored_scope=nncf.IgnoredScope(names=[*kept, *(f"{name}.weight" for name in kept)], validate=False),
            )
    except refused as error:
        raise StageError(
            f"NNCF cannot compress the model: {' '.join(str(error).split())}",
            hint="change the options that it names, or quantize with the stage gptq",
        ) from error
    except KeyError as error:
        if not options.awq:
            raise
        raise StageError(
            f"NNCF's AWQ has no statistics of {error.args[0]}, into which it would fold its factors.",
            expected="where a layer feeds another (up_proj feeds down_proj) both of them quantized, or neither",
            hint="set awq: false, or keep both layers",
        ) from error
    return read_compressed(module, checkpoint)


@contextmanager
def _told_to(progress: Progress) -> Iterator[None]:
    """NNCF writes bars and notes to stdout, which is for results: its warnings become notes, the rest is left out."""
    # Once nncf is imported, which gives this logger a class of its own.
    logger = logging.getLogger("nncf")
    handlers, logger.handlers = logger.handlers, [_Notes(progress)]
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.handlers = handlers


class _Notes(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Of what it only mentions, this says that AWQ did nothing.
        if record.levelno >= logging.WARNING or message.startswith("No matching patterns"):
            self._progress.note(f"nncf: {message}")


@dataclass(frozen=True)
class _Chosen:
    decoder: BlockwiseModel
    options: NncfOptions
    plan: Sequence[Sequence[Layer]]
    tables: Sequence[Layer]
    compressed: Compressed
    context: Context

    def keep(self) -> QuantizedCheckpoint:
        """Write what NNCF chose. Raises `StageError` for what the format has no place for."""
        import nncf

        layers = {layer.name for layer in (*self.tables, *(layer for block in self.plan for layer in block))}
        prefixes = tuple(f"{self.decoder.prefix}.{index}." for index in range(len(self.plan)))
        stray = [name for name in self.compressed.weights if name not in layers]
        stray += [name for name in self.compressed.changed if not name.startswith(prefixes)]
        if stray:
            raise StageError(
                f"NNCF changed {', '.join(sorted(stray))}, which the GPTQ format has no place for.",
                expected="linear layers of the blocks, the embedding and the head",
                hint="quantize this model with the stage gptq",
            )
        weights, scratch = self.compressed.weights, self.context.scratch
        settled_layers = [[self._settled(layer) for layer in block] for block in self.plan]
        tables = [self._settled(layer) for layer in self.tables]
        symmetric = all(weights[layer.name].symmetric for block in settled_layers for layer in block if layer.bits)
        config = self.options.equivalent.model_copy(update={"sym": symmetric})
        finished = BlockCache(scratch)
        for index, block in enumerate(settled_layers):
            # Yield a block's packed layers, and the float tensors of it that NNCF changed.
            prefix = f"{self.decoder.prefix}.{index}."
            tensors = {name: tensor for name, tensor in self.compressed.changed.items() if name.startswith(prefix)}
            for layer in block:
                if layer.bits:
                    parts = pack_layer(self.compressed.weights[layer.name], stored_less_one=symmetric)
                    tensors |= {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
            finished.store(index, tensors, block)
        work = EmbeddingTables(scratch / "tables-nncf")
        if coarse := {layer.name: weights[layer.name] for layer in tables if layer.bits}:
            keep_tables(coarse, tables, work.folder)
        made_by = {"quantizer": [f"nncf:{nncf.__version__}"], **{name: getattr(self.options, name) for name in _SAID}}
        # Bits of a parameter, scales and zero points included.
        parameters, skipped = self.decoder.count_parameters(), self.decoder.tied_tensors
        other_parameters = parameters - sum(weight.integers.numel() for weight in weights.values())
        bits = sum(weight.size_bits() for weight in weights.values()) + FLOAT_BITS * other_parameters
        result = Result(
            *(self.decoder.checkpoint, config, settled_layers, tables, bits / parameters),
            *(finished, work, skipped, made_by),
        )
        self._note(result)
        return result.write(scratch / "checkpoint")

    def _settled(self, layer: Layer) -> Layer:
        weight = self.compressed.weights.get(layer.name)
        if weight is None:
            return replace(layer, bits=None, group_size=None, why=layer.why or "kept in float by NNCF")
        return replace(layer, bits=weight.bits, group_size=weight.group_size, why="")

    def _note(self, result: Result) -> None:
        alone: dict[str, list[str]] = {}
        for layer in result.layers:
            if layer.bits is None:
                alone.setdefault(layer.why, []).append(layer.name)
        left = "".join(
            f"; {(', '.join(names) if len(names) <= _NAMED else f'{len(names)} such as {names[0]}')} left alone ({why})"
            for why, names in alone.items()
        )
        counts = {bits: sum(layer.bits == bits for layer in result.layers) for bits in (4, 8)}
        words = " and ".join(f"{count} at {bits} bits" for bits, count in counts.items() if count)
        changed = f"; {len(self.compressed.changed)} other tensors changed" if self.compressed.changed else ""
        self.context.note(
            f"nncf: of {sum(map(len, self.plan))} layers and {len(self.tables)} tables {words}, "
            f"{result.average_bits:.2f} bits a parameter on average{changed}{left}"
        )


@dataclass(frozen=True)
class Compressed:
    """``weights`` by module, ``changed`` float tensors by name: AWQ folds its factors into the layer before."""

    weights: Mapping[str, QuantizedWeight]
    changed: Mapping[str, torch.Tensor]


def read_compressed(module: nn.Module, source: Checkpoint) -> Compressed:
    """Return the tensors that replace ``source``'s in ``module``, which NNCF compressed in place.

    Raises `StageError` for what no checkpoint can hold: a factor that is applied to activations at run time, and
    weights that are no matrix.
    """
    from nncf.torch.function_hook.hook_storage import decode_hook_name
    from nncf.torch.function_hook.wrapper import get_hook_storage

    # A tied weight has one parameter and two names; the first is the embedding's.
    names = {parameter: name for name, parameter in module.named_parameters()}
    weights: dict[str, QuantizedWeight] = {}
    for hook_name, hook in get_hook_storage(module).named_hooks():
        kind, operation, _ = decode_hook_name(hook_name)
        if kind == "pre_hooks":
            raise StageError(
                f"NNCF's AWQ scales the inputs of {operation} at run time, which a checkpoint has no place for.",
                expected="an architecture whose feed-forward part multiplies by a gate, as Llama's and Qwen's do",
                hint="set awq: false",
            )
        name = names[module.get_parameter(operation)]
        weights[name.removesuffix(".weight")] = unpacked(hook, module.get_parameter(name), name)
    changed = {
        name: parameter.data
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and name in source.files
        if not torch.equal(parameter.data, source.stored(name).float())
    }
    return Compressed(weights, changed)


def unpacked(decompressor: Any, packed: torch.Tensor, name: str) -> QuantizedWeight:
    """Return the integers of one of NNCF's weights [rows, columns]; ``decompressor`` is the hook that expands them.

    Scales are NNCF's own float16, which may be negative: four bits reach from -8 to 7, and the end that reaches farther
    is given to the side that needs it.
    """
    from nncf.torch.quantization import layers
    from nncf.torch.quantization.quantize_functions import unpack_int4, unpack_uint4

    shape = getattr(decompressor, "result_shape", None) or packed.shape
    if len(shape) != 2:
        raise StageError(
            f"NNCF quantized {name} {list(shape)}, which is no matrix, so that the GPTQ format has no place for it.",
            hint="quantize this model with the stage gptq",
        )
    rows, columns = shape
    scales = decompressor._scale.float().reshape(rows, -1)
    if isinstance(decompressor, layers.INT4SymmetricWeightsDecompressor):
        bits, zeros, integers = 4, torch.full(scales.shape, 8), unpack_int4(packed) + 8
    elif isinstance(decompressor, layers.INT4AsymmetricWeightsDecompressor):
        bits, zeros, integers = 4, unpack_uint4(decompressor._zero_point), unpack_uint4(packed)
    elif isinstance(decompressor, layers.INT8SymmetricWeightsDecompressor):
        bits, zeros, integers = 8, torch.full(scales.shape, 128), packed.to(torch.int16) + 128
    else:
        raise StageError(f"NNCF left a {type(decompressor).__name__} at {name}.", expected="4 or 8-bit integers")
    integers, zeros = integers.reshape(rows, columns).to(torch.uint8), zeros.reshape(scales.shape).to(torch.uint8)
    return QuantizedWeight(integers, scales, zeros, bits, group_size=columns // scales.shape[1])
