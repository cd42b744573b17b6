"""ONNX Runtime's own format."""

from __future__ import annotations

from dataclasses import replace

from compress.formats.onnx import APPS, CPU
from compress.formats.onnx import FORMAT as ONNX
from compress.formats.spec import FormatSpec
from compress.formats.target_profile import Target, TargetProfile

_OPENED_BY = ("onnxruntime", "onnxruntime-web", "onnxruntime-web-node")
FORMAT = FormatSpec(
    name="ort",
    rank=1,
    suffix=".ort",
    stage="compress.formats.ort.stage:Ort",
    written_by="ort",
    written_from=ONNX.name,
    runtimes={name: replace(ONNX.runtimes[name], on_devices=False) for name in _OPENED_BY},
    targets=(TargetProfile(Target("ort", "onnxruntime", CPU, "ONNX Runtime's phone format, run here", "ort")),),
    taken_by={"node": None, "browser": None, **APPS},
    tensors="compress.formats.ort.model:read_tensors",
    value_graph="compress.formats.onnx.intermediate_values:open_value_graph",
    library="onnxruntime",
)
