"""A quantized checkpoint in the layout of compressed-tensors: the same integers and scales, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import torch
from torch import nn

from compress.models.checkpoint import TABLES, CompressedTensorsCheckpoint, QuantizedCheckpoint, write_shards
from compress.models.compressed_tensors_layout import pack_layer, store_int8_layer
from compress.models.meta_model import build_on_meta
from compress.models.model import link_or_copy
from compress.models.quantization_config import COMPRESSED_TENSORS, Scheme, compressed_tensors_config
from compress.stages.base import Context
from compress.stages.blockwise.write import write_companions
from compress.utils.errors import ModelError, StageError

_OF_GPTQ = "quantize_config.json"
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM and SGLang make one of, by their names in most models."""


def write_compressed_tensors(
    checkpoint: QuantizedCheckpoint, activation_bits: int, context: Context
) -> CompressedTensorsCheckpoint:
    """Write the checkpoint in that layout into the scratch folder, and verify it with compressed-tensors.

    Raises `ModelError` for layers that the layout, or those who read it, have no place for, and `StageError` for an
    integer that came back as another.
    """
    settings = {name: checkpoint.layer_settings(name) for name in checkpoint.integer_layers}
    layers = {name: (layer_format["bits"], layer_format["group_size"]) for name, layer_format in settings.items()}
    # Linear layers of transformers' module that stay float. Raises `ModelError` where ``layers`` are none of them.
    model = build_on_meta(checkpoint.folder)
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    odd = sorted(set(layers).difference(linear))
    if odd:
        raise ModelError(
            f"compressed-tensors keeps linear layers, and {len(odd)} that are quantized here are none in transformers' "
            f"{type(model).__name__}, such as {odd[0]}.",
            where=str(checkpoint.folder),
            expected="torch.nn.Linear; experts that transformers keeps in one tensor are not, nor are GPT-2's layers",
            hint="serve the GPTQ checkpoint itself, which vLLM and SGLang read too",
        )
    others = [name for name in linear if name not in layers]
    _check(checkpoint, layers, others, activation_bits)
    folder = context.scratch / "served"
    config = compressed_tensors_config(layers, others, activation_bits, version(COMPRESSED_TENSORS))
    write_companions(checkpoint, folder, quantization_config=config)
    (folder / _OF_GPTQ).unlink(missing_ok=True)
    # With an index, so that nobody takes `TABLES` for weights.
    write_shards(folder, _tensors(checkpoint, layers, activation_bits), index_one=bool(checkpoint.tables))
    if checkpoint.tables:
        link_or_copy(checkpoint.folder / TABLES, folder / TABLES)
    exported = CompressedTensorsCheckpoint(folder)
    for name in context.progress.track(layers, "reading back", len(layers)):
        _compare(checkpoint, exported, name)
    kinds = {
        f"W{bits}A{activation_bits} {'by row' if size == -1 else f'in groups of {size}'}"
        for bits, size in layers.values()
    }
    left = f"; in float16: {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""
    context.note(
        f"compressed-tensors: {len(layers)} layers, {', '.join(sorted(kinds))}, every integer and scale verified "
        f"after writing{left}; not run on a GPU here"
    )
    return exported


def _check(
    checkpoint: QuantizedCheckpoint, layers: Mapping[str, Scheme], others: Sequence[str], activation_bits: int
) -> None:
    where = str(checkpoint.folder)
    if activation_bits == 8 and (odd := [name for name, scheme in layers.items() if scheme != (8, -1)]):
        bits, size = layers[odd[0]]
        raise ModelError(
            f"Products of 8-bit integers need a scale for each row, and {odd[0]} has {bits} bits, group_size {size}.",
            where=where,
            expected="bits: 8 and group_size: -1 in every layer, or activation_bits: 16",
        )
    known: dict[str, Scheme | None] = {**dict.fromkeys(others), **layers}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for family in _FUSED:
            beside = [name for leaf in family if (name := f"{owner}.{leaf}") in known]
            if len({known[name] for name in beside}) > 1:
                raise ModelError(
                    f"vLLM and SGLang make one layer of {', '.join(beside)}, whose bits or groups differ.",
                    where=where,
                    expected="the same in all of them",
                    hint="give gptq one number of bits instead of target_bits, and keep all of them or none",
                )


def _tensors(
    checkpoint: QuantizedCheckpoint, layers: Mapping[str, Scheme], activation_bits: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in checkpoint.files:
        module, _, part = name.rpartition(".")
        if module not in layers or part == "bias":
            yield name, checkpoint.stored(name)
        elif part == "qweight":
            weight = checkpoint.quantized(module)
            assert weight is not None, "it has integers"
            parts = store_int8_layer(weight) if activation_bits == 8 else pack_layer(weight)
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in parts.items())


def _compare(checkpoint: QuantizedCheckpoint, made: CompressedTensorsCheckpoint, name: str) -> None:
    """Raise `StageError` where compressed-tensors' own unpacking has another integer or scale."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = checkpoint.quantized(name)
    assert weight is not None, "it has integers"
    if not weight.symmetric:
        raise ModelError(
            f"{name} has zero points, with which transformers' loader does not open the layout.",
            where=str(checkpoint.folder),
            expected="sym: true in the stage that quantized it",
        )
    if f"{name}.weight" in made.files:
        integers = made.stored(f"{name}.weight")
    else:
        shape = torch.Size(made.stored(f"{name}.weight_shape").tolist())
        integers = unpack_from_int32(made.stored(f"{name}.weight_packed"), weight.bits, shape)
    expected = weight.integers.to(torch.int16) - (1 << (weight.bits - 1))
    scales = made.stored(f"{name}.weight_scale").float()
    if not (torch.equal(integers.to(torch.int16), expected) and torch.equal(scales, weight.scales)):
        raise StageError(
            f"compressed-tensors unpacks other numbers of {name} than the checkpoint has.",
            hint="this is a defect of the stage; please report it with the recipe",
        )
