"""Decoders as one ONNX graph, in fp32 and in 4 bits, proven against torch.

Each is read in one go, token by token, padded, and past the chunks by which recurrences go.
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
    """The largest difference of a logit in fp32 and in 4 bits, how attention is written, and the number of nodes."""
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
        few = in_four_bits(model, Checkpoint(folder / "float"), folder / "few")
        settings = GraphSettings(accuracy_level=1)
        cells["4 bits"] = f"{export_verified_decoder(few, settings, windows, _TOLERANCE, 1.0).equality.difference:.0e}"
    except CompressError as error:
        cells["4 bits"] = f"no: {error.what}"
    return cells


TRIAL = Trial(("ONNX", "4 bits", "attention", "nodes"), judge)


def in_four_bits(model: Any, source: Checkpoint, folder: Path) -> Checkpoint:
    """The linear layers of a model rounded to the nearest of 4 bits in groups of 32, in GPTQ's layout."""
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
            parts = pack_layer(_rounded(source.stored(name)), stored_less_one=True)
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


def _rounded(weight: torch.Tensor) -> QuantizedWeight:
    middle = 1 << (_BITS - 1)
    groups = weight.float().reshape(len(weight), -1, _GROUP)
    scales = (groups.abs().amax(-1) / (middle - 1)).clamp(min=1e-6).half().float()
    integers = (groups / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    return QuantizedWeight(integers.reshape(weight.shape).to(torch.uint8), scales, zeros, _BITS, _GROUP)
