"""The modules that the fork server of `forked` preloads: those that most commands import, in the same order.

It also exports a tiny model, because the first export in a process takes twice as long as later ones.
"""

from __future__ import annotations

import gc

from compress.formats.quiet_output import defer_torchao_import, suppress_output

defer_torchao_import()

import torch  # noqa: E402
import transformers.exporters.exporter_onnx  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401
from tqdm import tqdm  # noqa: E402

import compress.cli  # noqa: E402
import compress.pipeline.run  # noqa: E402, F401
from compress.formats.onnx.export import export_onnx  # noqa: E402

interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
"""No progress bar may start tqdm's monitor thread, because a fork does not copy threads."""
with suppress_output("logs"), torch.random.fork_rng():
    import tiny

    model = tiny.encoder(num_hidden_layers=1)
    export_onnx(model, tiny.context().encode("train", model), opset=None, fusions=True)
    del model
tqdm.monitor_interval = interval
gc.collect()
gc.freeze()
