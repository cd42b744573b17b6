"""INT8 with the default settings of ONNX Runtime's dynamic and static quantizers and of NNCF.

Each gets a float graph and the calibration examples, with two exceptions from the defaults. Recorded shapes are
removed, since those of fused graphs are inconsistent. NNCF is told which models are transformers, as its documentation
recommends.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.int8.static import run_nncf


def onnxruntime_dynamic(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Quantize with `quantize_dynamic`."""
    from onnxruntime.quantization import quantize_dynamic

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(_without_shapes(graph), output, extra_options=extra)
        return onnx.load(output)


def onnxruntime_static(plain: onnx.ModelProto, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """Quantize with `quantize_static`: QDQ, signed INT8, per tensor, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = {value.name for value in plain.graph.input}
            self._feeds = iter([{name: array for name, array in feed.items() if name in names} for feed in feeds])

        def get_next(self) -> Feed | None:
            """Return the next feed, or None at the end."""
            return next(self._feeds, None)

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "float.onnx", Path(folder) / "model.onnx"
        onnx.save(_without_shapes(plain), source)
        quantize_static(source, output, Reader())
        return onnx.load(output)


def nncf_default(graph: onnx.ModelProto, feeds: Sequence[Feed], transformer: bool) -> onnx.ModelProto:
    """Quantize with `nncf.quantize`, with the model type for transformers if ``transformer``."""
    return run_nncf(graph, feeds, transformer)


def _without_shapes(graph: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    del copied.graph.value_info[:]
    return copied


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous_level)
