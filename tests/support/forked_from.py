"""What the process of `forked` imports before it is forked: what most commands do, and in the same order."""

from __future__ import annotations

import gc

from compress.formats.silence import put_off_torchao

put_off_torchao()

import transformers.exporters.exporter_onnx  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401

import compress.cli  # noqa: E402
import compress.formats.onnx.export  # noqa: E402
import compress.formats.onnx.parity  # noqa: E402
import compress.pipeline.run  # noqa: E402, F401

gc.collect()
gc.freeze()
