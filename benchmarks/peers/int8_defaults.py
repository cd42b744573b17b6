"""What other people's INT8 gives by default: ONNX Runtime's dynamic and static quantizers, and NNCF.

Each is given a float graph and the calibration examples, and nothing is chosen for it, but for two things. Recorded
shapes are dropped, which a fused graph's contradict. NNCF is told what is a transformer, as its documentation says for
encoders.
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
    """`quantize_dynamic` with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(_without_shapes(graph), output, extra_options=extra)
        return onnx.load(output)


def onnxruntime_static(plain: onnx.ModelProto, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """`quantize_static` with its defaults: QDQ, 8-bit signed integers, one scale a tensor, min and max."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = {value.name for value in plain.graph.input}
            self._feeds = iter([{name: array for name, array in feed.items() if name in names} for feed in feeds])

        def get_next(self) -> Feed | None:
            """The next feed, or None at the end."""
            return next(self._feeds, None)

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "float.onnx", Path(folder) / "model.onnx"
        onnx.save(_without_shapes(plain), source)
        quantize_static(source, output, Reader())
        return onnx.load(output)


def nncf_default(graph: onnx.ModelProto, feeds: Sequence[Feed], transformer: bool) -> onnx.ModelProto:
    """`nncf.quantize`, with the model type of transformers for one."""
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
