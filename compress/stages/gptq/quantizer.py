"""Quantizing a checkpoint from beginning to end: check everything, choose bits, quantize tables and blocks, write."""

from __future__ import annotations

import json
import shutil
from collections import ChainMap, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.folder_checks import refuse_quantized
from compress.stages.base import Context
from compress.stages.block_qat.trainer import BlockTrainer
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import BlockRun, CalibrationActivations, Importance, calibration_sequences
from compress.stages.blockwise.layers import Layer, about_starved, linears, plan_layers, with_bits
from compress.stages.blockwise.resume import (
    TABLE_BITS,
    BlockCache,
    EmbeddingTables,
    choose_table_bits,
    plan_tables,
    quantize_tables,
)
from compress.stages.blockwise.write import Result, cached_json
from compress.stages.gptq.bit_allocation import Allocation, Survey, allocate, average_bits
from compress.stages.gptq.settings import FLOAT_BITS, BlockTraining, Quantization
from compress.stages.gptq.solver import Solved, solve_layers
from compress.stages.gptq.token_weighting import Gradients
from compress.stages.training.malloc import give_back_freed_memory, keep_freed_memory
from compress.utils.storage import disk_full, storage_errors
from compress.utils.torch_device import autocast, current_device, device_memory_errors, device_uses_bf16

_KEPT_BYTES = 1 << 26
"""Tensors of small models' blocks are served from memory that is at hand; those of large ones are given back."""
_LOWER = "samples, sequence_length or, where blocks are trained, batch_size"
_TABLE_CHOICES = (*TABLE_BITS, FLOAT_BITS)


def quantize(
    checkpoint: Checkpoint, config: Quantization, context: Context, training: BlockTraining | None = None
) -> QuantizedCheckpoint:
    """Quantize a checkpoint and write it in GPTQ format into the scratch folder.

    Blocks that a killed or failed run has finished are reused.

    Args:
        checkpoint: Float model.
        config: Bits, groups, algorithm and calibration text.
        context: Data and folders of the stage.
        training: How each block is trained before it is written, or None.

    Raises:
        CompressError: The model cannot be quantized so, the text is too short, or the disk is full.
    """
    keep_freed_memory(_KEPT_BYTES)
    refuse_quantized(checkpoint.folder)
    decoder = build_blockwise_model(checkpoint, current_device())
    plan = plan_layers(decoder, config)
    plan_tables(decoder, config, config.embedding_bits or _TABLE_CHOICES[0])
    ids = None
    # Rounding to nearest reads no text.
    if config.method != "rtn":
        ids = calibration_sequences(context, checkpoint, config.samples, config.sequence_length)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        try:
            return _Work(decoder, config, context, plan, ids, training).run()
        # safetensors reports a full disk as its own error.
        except SafetensorError as error:
            if "No space left on device" in str(error):
                raise disk_full(context.scratch) from error
            raise


def check_fits(
    folder: Path, config: Quantization, cuts: Sequence[Callable[[Any], bool]], any_tables: bool = False
) -> None:
    """Raise `ModelError` for matrices of the checkpoint in ``folder`` that the format cannot hold once they are cut.

    ``cuts`` cut a model without weights, in place. Where one says that it cannot tell how far, nothing is asked; of
    tables nothing where those of any width will do.
    """
    decoder = build_blockwise_model(Checkpoint(folder))
    if all(cut(decoder.model) for cut in cuts):
        plan_layers(decoder, config)
        if not any_tables:
            plan_tables(decoder, config, config.embedding_bits or _TABLE_CHOICES[0])


@dataclass
class _Work:
    decoder: BlockwiseModel
    config: Quantization
    context: Context
    plan: tuple[tuple[Layer, ...], ...]
    ids: torch.Tensor | None
    training: BlockTraining | None = None

    def run(self) -> QuantizedCheckpoint:
        table_bits = choose_table_bits(self.decoder, self.config)
        importance = self._importance()
        # Mixed precision: choose the bits of each layer before anything is quantized.
        if self.config.mixed:
            chosen = self._allocation(importance)
            self.plan, table_bits = with_bits(self.plan, chosen.bits), chosen.tables
            counts = {bits: list(chosen.bits.values()).count(bits) for bits in sorted(set(chosen.bits.values()))}
            layers = ", ".join(f"{count} layers at {bits}" for bits, count in counts.items())
            self.context.note(
                f"mixed bits: {layers}, the tables at {chosen.tables}; {chosen.average:.2f} bits on average"
            )
        elif self.config.embedding_bits is None:
            self.context.note(f"embedding and head: {table_bits} bits, since `embedding_bits` is not set")
        # From here on the model computes with the types that the file will store.
        self.decoder.shipped = torch.float16
        self.decoder.exact = frozenset(layer.name for block in self.plan for layer in block if layer.bits)
        scratch, finished, text = self.context.scratch, BlockCache(self.context.scratch), None
        if self.ids is not None:
            text = CalibrationActivations(self.decoder, self.config, self.ids, scratch, importance)
        self._walk(text, finished)
        give_back_freed_memory()
        # Tables come last: the head's Hessian is that of the last block's quantized outputs.
        work, tables = self._tables("final", table_bits, None if text is None else text.table_hessian)
        results = tuple(finished.layers(index) or () for index in range(len(self.plan)))
        average = average_bits(results, tables, self.decoder.count_parameters(), self.config.sym)
        result = Result(
            self.decoder.checkpoint, self.config, results, tables, average, finished, work, self.decoder.tied_tensors
        )
        quantized = [layer for layer in result.layers if layer.bits]
        alone = [f"{layer.name} ({layer.why})" for layer in result.layers if layer.bits is None]
        worst = max(quantized, key=lambda layer: layer.error or 0.0)
        left = f"; left alone: {', '.join(alone)}" if alone else ""
        bits = f"{average:.2f} bits a parameter on average, the largest error {worst.error:.2%} in {worst.name}"
        self.context.note(f"quantized {len(quantized)} layers to {bits}{left}")
        if starved := about_starved(result.layers, self.config.expert_tokens):
            self.context.note(starved)
        return result.write(scratch / "checkpoint")

    @torch.no_grad()
    def _walk(self, text: CalibrationActivations | None, finished: BlockCache) -> None:
        """Quantize every block that is not done yet: solved on ``text``, or all layers rounded to nearest without it.

        Blocks that are done count only if the states that enter the next one are here.
        """
        done = finished.count(len(self.plan))
        # A block that is trained needs two streams: activations of the quantized model, and of the float model.
        streams = () if text is None else (text,) if self.training is None else (text, text.as_float("float"))
        first = done if done == 0 or all(stream.entering(done).are_whole for stream in streams) else 0
        if first:
            self.context.progress.note(f"{first} of {len(self.plan)} blocks were finished by an earlier run")
        remaining = range(first, len(self.plan))
        for index in self.context.progress.track(remaining, "quantizing blocks", len(remaining)):
            with device_memory_errors(f"{self.decoder.prefix}.{index}", _LOWER):
                self._block(index, streams, finished)

    def _block(self, index: int, streams: Sequence[CalibrationActivations], finished: BlockCache) -> None:
        """Quantize block ``index`` on the first of ``streams``, and train it to answer as it does on the second."""
        block = self.decoder.load(index)
        name = f"{self.decoder.prefix}.{index}"
        plan = {layer.name: layer for layer in self.plan[index]}
        # Layers without bits stay in float.
        modules = {name: part for name, part in linears(block, name).items() if plan[name].bits}
        trainer = self._trainer(index, modules, *streams) if len(streams) > 1 else None
        work = streams[0].pass_through(index, modules) if streams else None
        solved_layers: dict[str, Solved] = {}
        vectors: Mapping[str, torch.Tensor] = {}

        def quantize(names: Sequence[str], hessian: torch.Tensor | None) -> None:
            given, weights = [plan[name] for name in names], [modules[name].weight for name in names]
            with autocast(False, self.decoder.device):
                solutions = solve_layers(self.config, given, weights, hessian)
            for name, solved in zip(names, solutions, strict=True):
                sent = None if work is None else work.sent(name)
                layer = solved.layer if sent is None else solved.layer.sent(sent, self.config.expert_tokens)
                solved_layers[name] = Solved(solved.weight, layer)
                modules[name].weight = nn.Parameter(solved.weight.dequantize(), requires_grad=False)

        if work is None:
            for module_name in modules:
                quantize([module_name], None)
        else:
            # Each layer is solved on inputs that have passed the quantized layers before it.
            outputs = work.solve(quantize)
            if trainer is not None:
                # Run the generator to its end, since training begins from all solved layers.
                deque(outputs, maxlen=0)
                trained = trainer.train({name: solved.weight for name, solved in solved_layers.items()})
                for layer_name, weight in trained.weights.items():
                    # The block's error after training replaces the layer's own one in the report.
                    layer = replace(solved_layers[layer_name].layer, block_error=trained.after)
                    solved_layers[layer_name] = Solved(weight, layer)
                (self.context.note if trained.stopped else self.context.progress.detail)(f"{trainer.name}: {trained}")
                vectors = trained.vectors
                outputs = (work.run(batch()) for batch in work.batches)
            streams[0].leave(index, outputs)
        # Only one block is in memory at a time.
        self.decoder.unload(index)
        packed = [solved.packed(stored_less_one=self.config.sym) for solved in solved_layers.values()]
        layers = [solved_layers[name].layer if name in solved_layers else layer for name, layer in plan.items()]
        finished.store(index, dict(ChainMap(*packed, dict(vectors))), layers)
        for stream in streams:
            stream.forget(index)
        results = [
            f"{layer.name.removeprefix(f'{name}.')} "
            + (f"left alone ({layer.why})" if layer.bits is None else f"{layer.bits} bits {layer.error:.2%}")
            for layer in layers
        ]
        self.context.progress.detail(f"{name}: {', '.join(results)}")

    def _trainer(
        self, index: int, modules: Mapping[str, nn.Linear], text: CalibrationActivations, floats: CalibrationActivations
    ) -> BlockTrainer:
        """Return the trainer of the loaded block, while it still has its own weights."""
        training, precision = self.training, self.config.precision
        assert training is not None
        floats.pass_as_it_is(index)
        run = BlockRun.of(self.decoder, self.config, index, text.ids, training.batch_size)
        run = replace(run, bf16=device_uses_bf16("fastest" if precision == "auto" else precision))
        name, block = f"{self.decoder.prefix}.{index}", self.decoder.blocks[index]
        float_weights = {layer: module.weight.data for layer, module in modules.items()}
        given, wanted = text.entering(index), floats.entering(index + 1)
        return BlockTrainer(name, block, modules, float_weights, run, given, wanted, training, self.context.seed)

    def _tables(
        self, use: str, bits: int, hessian: Callable[[], torch.Tensor] | None
    ) -> tuple[EmbeddingTables, tuple[Layer, ...]]:
        """Return the tables at so many bits, computed or stored; rounded to nearest without a ``hessian``."""
        work = EmbeddingTables(self.context.scratch / f"tables-{bits}-{use}")
        plan = plan_tables(self.decoder, self.config, bits)
        return work, quantize_tables(self.decoder, self.config, plan, hessian, work.folder)

    def _importance(self) -> Importance | None:
        """Return the weight of each token, measured once and stored; None if all count alike."""
        if self.ids is None or not self.config.guided:
            return None
        path, scratch = self.context.scratch / "importance.safetensors", self.context.scratch / "gradients"
        if not path.is_file():
            work = Gradients(self.decoder, self.config, self.ids, scratch, self.context.progress, self.context.seed)
            with device_memory_errors("measuring token importance", f"{_LOWER}, or guided: false"):
                work.importance().write(path)
        return Importance.read(path)

    def _allocation(self, importance: Importance | None) -> Allocation:
        """Chosen once and kept, since it takes a pass over the model."""
        path = self.context.scratch / "allocation.json"
        if path.is_file():
            return Allocation(**json.loads(path.read_text()))
        assert self.ids is not None
        tables = plan_tables(self.decoder, self.config, _TABLE_CHOICES[0])
        choices: tuple[int, ...] = (self.config.embedding_bits,) if self.config.embedding_bits else _TABLE_CHOICES
        choices = choices if all(table.bits for table in tables) else (FLOAT_BITS,)
        coarse = [bits for bits in choices if bits != FLOAT_BITS]
        folder = self.context.scratch / "survey"
        folder.mkdir(exist_ok=True)
        survey = Survey(
            self.decoder, self.config, self.plan, self.config.choices, self.context.progress, folder, importance
        )
        # The first table's error acts on all blocks, the last one's on the logits alone.
        embeddings = {bits: self._table(bits, 0, None) for bits in coarse}
        with device_memory_errors("measuring sensitivity", _LOWER):
            sensitivity = survey.run(
                self.ids, embeddings, lambda hessian: {bits: self._table(bits, -1, hessian.clone) for bits in coarse}
            )
        shutil.rmtree(folder)
        parameters = self.decoder.count_parameters()
        chosen = allocate(self.config, self.plan, tables, parameters, sensitivity, choices)
        cached_json(path, asdict(chosen))
        return chosen

    def _table(self, bits: int, place: int, hessian: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        """Return the first table, the embedding, or the last, the head, at so many bits."""
        work, tables = self._tables("solved" if hessian else "to-nearest", bits, hessian)
        return work.floats(tables[place].name)
