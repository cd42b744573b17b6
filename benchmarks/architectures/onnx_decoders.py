"""Test decoders as one ONNX graph, in fp32 and in 4 bits, against torch.

Each is run as one prefill, token by token, with padding, and on sequences longer than the chunks of recurrences.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_decoders import save, some_ids
from trials import Trial

from compress.formats.onnx.decoder import GraphSettings, export_verified_decoder
from compress.models.checkpoint import Checkpoint
from compress.models.gptq_layout import pack_layer
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import CompressError

_LENGTH, _GROUP, _BITS = 20, 32, 4
_TOLERANCE = 1e-3


def judge(name: str, folder: Path) -> dict[str, str]:
    """Return the largest difference of a logit in fp32 and 4 bits, the form of attention, and the number of nodes."""
    model = save(name, folder / "float")
    windows = some_ids(2, _LENGTH).numpy()
    exported = export_verified_decoder(Checkpoint(folder / "float"), GraphSettings(), windows, _TOLERANCE, 1.0)
    kinds = Counter(node.op_type for node in exported.model.graph.graph.node)
    fused = f"{kinds['GroupQueryAttention']} fused"
    cells = {
        "ONNX": f"{exported.equality.difference:.0e}",
        "attention": f"as it is: {exported.unfused}" if exported.unfused else fused,
        "nodes": str(sum(kinds.values())),
    }
    try:
        quantized = quantize_checkpoint(model, Checkpoint(folder / "float"), folder / "quantized")
        exported = export_verified_decoder(quantized, GraphSettings(accuracy_level=1), windows, _TOLERANCE, 1.0)
        cells["4 bits"] = f"{exported.equality.difference:.0e}"
    except CompressError as error:
        cells["4 bits"] = f"no: {error.what}"
    return cells


TRIAL = Trial(("ONNX", "4 bits", "attention", "nodes"), judge)


def quantize_checkpoint(model: Any, source: Checkpoint, folder: Path) -> Checkpoint:
    """Save a checkpoint with linear layers rounded to 4 bits in groups of 32, in the layout of GPTQ."""
    folder.mkdir(parents=True)
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    names = {
        name
        for name, layer in layers.items()
        if layer is not head and not layer.in_features % _GROUP and not layer.out_features % _GROUP
    }
    tensors: dict[str, torch.Tensor] = {}
    for name in source.files:
        module = name.removesuffix(".weight")
        if module in names and name.endswith(".weight"):
            parts = pack_layer(_round_to_nearest(source.stored(name)), stored_less_one=True)
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = source.stored(name).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": _BITS, "group_size": _GROUP, "sym": True, "desc_act": False}
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {**quantization, "checkpoint_format": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return Checkpoint(folder)


def _round_to_nearest(weight: torch.Tensor) -> QuantizedWeight:
    middle = 1 << (_BITS - 1)
    groups = weight.float().reshape(len(weight), -1, _GROUP)
    scales = (groups.abs().amax(-1) / (middle - 1)).clamp(min=1e-6).half().float()
    integers = (groups / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    return QuantizedWeight(integers.reshape(weight.shape).to(torch.uint8), scales, zeros, _BITS, _GROUP)
