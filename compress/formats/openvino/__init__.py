"""OpenVINO IR."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import Target, TargetProfile

FORMAT = FormatSpec(
    name="openvino",
    rank=2,
    suffix=".xml",
    beside=("openvino_tokenizer.xml", "openvino_detokenizer.xml"),
    stage="compress.formats.openvino.stage:OpenVino",
    written_by="openvino",
    own_bits=True,
    find_all="compress.formats.openvino.model:find_graphs",
    runtimes={
        "openvino": RuntimeSpec(
            runtime="compress.formats.openvino.runtime:RUNTIME",
            provider="CPU",
            package="openvino",
            many_texts="compress.formats.openvino.decoder:GenaiTexts",
            writing_packages=("openvino", "openvino-genai", "openvino-tokenizers"),
        )
    },
    targets=(TargetProfile(Target("openvino", "openvino", "CPU", "OpenVINO on this machine's processor", "openvino")),),
    taken_by={"desktop": None},
    tensors="compress.formats.openvino.model:read_tensors",
    check_writable="compress.formats.onnx.decoder.trace:check_writable",
)
