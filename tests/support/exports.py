"""ONNX exports of tiny encoders, cached for the whole test session because tracing takes seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import tiny

from compress.formats.onnx import export as onnx_export
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.models.model import TorchModel
from compress.tasks.task import Examples


@dataclass(frozen=True)
class ExportedGraph:
    """An exported model: its graph before and after the rewrites, and the number of matches of each rewrite."""

    model: TorchModel
    examples: Examples
    content: bytes
    before_rewrites: bytes
    rewrites: Mapping[str, int]

    def graph(self) -> onnx.ModelProto:
        """Return a fresh copy of the exported graph, which the caller may modify."""
        return onnx.load_from_string(self.content)

    def unfused(self) -> ir.Model:
        """Return a fresh copy of the graph as the exporter wrote it, before the rewrites."""
        return ir.from_proto(onnx.load_from_string(self.before_rewrites))


def exported(architecture: str = "bert", fusions: bool = True) -> ExportedGraph:
    """Return the export of a tiny encoder; it is created on the first call and cached."""
    return _exported(architecture, fusions)


@cache
def _exported(architecture: str, fusions: bool) -> ExportedGraph:
    model = tiny.encoder(architecture, processor=tiny.byte_level() if architecture == "roberta" else None)
    examples = tiny.context().encode("train", model)
    return export(model, examples, fusions)


def export(model: TorchModel, examples: Examples, fusions: bool = True) -> ExportedGraph:
    """Export ``model``, and keep the graph from before the rewrites as well."""
    before = []

    def keep(program: ir.Model, *leave_out: Collection[str]) -> dict[str, int]:
        before.append(ir.to_proto(program).SerializeToString())
        return rewrite(program, *leave_out)

    rewrite = onnx_export.optimize_graph
    with mock.patch.object(onnx_export, "optimize_graph", keep):
        exported_model = onnx_export.export_onnx(model, examples, None, fusions)
    content = exported_model.graph.SerializeToString()
    return ExportedGraph(model, examples, content, before[0] if before else content, exported_model.rewrites)


def run(graph: onnx.ModelProto | ir.Model | bytes, **inputs: np.ndarray) -> np.ndarray:
    """Run a graph on the CPU with ONNX Runtime's default optimizations and return its first output."""
    proto = ir.to_proto(graph) if isinstance(graph, ir.Model) else graph
    content = proto if isinstance(proto, bytes) else proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    outputs: np.ndarray = session.run(None, {name: value for name, value in inputs.items() if name in names})[0]
    return outputs


def batch(size: int, length: int, vocabulary: int, pad: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random token ids and attention mask, both [size, length], with rows right-padded from various lengths."""
    generator = np.random.default_rng([seed, size, length])
    ids = generator.integers(5, vocabulary, (size, length))
    lengths = np.array([length, *generator.integers(1, length + 1, size - 1)])
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}


def kernels(graph: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Count the operators that remain after ONNX Runtime's graph optimizations."""
    onnx.save(graph, folder / "model.onnx")
    return Counter(node.op_type for node in ir.load(write_optimized(folder / "model.onnx", folder, 1)).graph)
