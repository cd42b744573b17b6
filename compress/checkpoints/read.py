"""What a Hugging Face checkpoint stores, packed weights as their config means them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.checkpoints.checkpoint import layer_settings
from compress.checkpoints.json_file import read_json
from compress.checkpoints.safetensors_file import read_header
from compress.checkpoints.stored_tensor import StoredTensor

_PACKED_COMPANIONS = (".qzeros", ".scales", ".g_idx")


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """The tensors of a file as a GPTQ or AWQ config in ``root`` means them: packed weights, scales and zero points."""
    quantization = _quantization(root)
    return [_as_meant(tensor, layer_settings(quantization, tensor.module)["bits"]) for tensor in read_header(file)]


def _quantization(root: Path) -> dict[str, Any]:
    """What the folder's config says of a GPTQ or AWQ checkpoint; empty for any other."""
    if not (root / "config.json").is_file():
        return {}
    found = read_json(root / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def _as_meant(tensor: StoredTensor, bits: object) -> StoredTensor:
    """``bits`` are those of the weights that `NAME.qweight` packs into int32, where the config says them."""
    if not isinstance(bits, int) or bits < 1:
        return tensor
    if tensor.name.endswith(".qweight") and tensor.dtype == "int32":
        weights = tensor.elements * 32 // bits
        packed = {"role": "weight", "dtype": f"int{bits}", "parameters": weights, "packed": True}
        return tensor.model_copy(update=packed)
    if tensor.name.endswith(_PACKED_COMPANIONS):
        return tensor.model_copy(update={"role": "quantization", "parameters": 0})
    return tensor
