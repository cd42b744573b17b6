"""ONNX graphs in bundles, also in ONNX Runtime's own format."""

from __future__ import annotations

from pathlib import Path

from compress.bundle.format import Contents, Interface
from compress.formats.onnx.graph import Node, read_graph
from compress.formats.runtimes import get_runtime
from compress.runtimes.runtime import Session
from compress.runtimes.transcriber import Transcriber
from compress.targets import TARGETS, Target

_FEW_BITS = "MatMulNBits"
_INTEGER = ("QLinear", "MatMulInteger", "ConvInteger", "QAttention", "QGemm", "DynamicQuantize", "QuantizeLinear")


class _Onnx:
    """Through ONNX Runtime on this machine's processor."""

    target: Target = TARGETS["cpu"]
    templates = "onnx"

    def why_unread(self) -> str | None:
        """They always can: ONNX Runtime belongs to `compress`."""
        return None

    def interface(self, file: Path, session: Session | None) -> Interface:
        """As ONNX Runtime tells it; of several graphs, the one that reads inputs."""
        assert session is not None
        first = session.encoder if isinstance(session, Transcriber) else session
        return Interface(first.input_types, first.output_types)

    def contents(self, file: Path) -> Contents:
        """See `BundledFormat`. In ONNX Runtime's own format the graph is read without its versions."""
        if file.suffix == ".ort":
            from compress.formats.ort.graph import read_ort_graph

            graph, opsets = read_ort_graph(file), {}
        else:
            import onnx

            graph = read_graph(file)
            model = onnx.load(file, load_external_data=False)
            opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
        integers = any(map(_computes_in_integers, graph.nodes))
        stored = {one.name: (one.dtype, one.shape, one.bytes) for one in graph.initializers}
        few_bits = any(node.op_type == _FEW_BITS for node in graph.nodes)
        return Contents(dict(sorted(opsets.items())), integers, stored, few_bits)

    def minimum_version(self, file: Path) -> str:
        """The one that is here."""
        return get_runtime(self.target.runtime).build()


ONNX = _Onnx()


def _computes_in_integers(node: Node) -> bool:
    """Whether what it is given is rounded to integers: a product with weights in few bits does so at level 4."""
    return node.op_type.startswith(_INTEGER) or (node.op_type == _FEW_BITS and node.integers.get("accuracy_level") == 4)
