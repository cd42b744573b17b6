"""What the process of `forked` imports before it is forked: what most commands do, and in the same order."""

from __future__ import annotations

import gc

from compress.formats.silence import put_off_torchao, silence

put_off_torchao()

import transformers.exporters.exporter_onnx  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401
from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: E402

import compress.cli  # noqa: E402
import compress.formats.onnx.export  # noqa: E402
import compress.formats.onnx.parity  # noqa: E402
import compress.pipeline.run  # noqa: E402, F401
from compress.formats.tracing import lean_tracing  # noqa: E402

with silence("logs"), lean_tracing():  # which keeps what the first export would parse
    ONNXRegistry.from_torchlib()
gc.collect()
gc.freeze()
