"""What a part of a diffusers pipeline costs, by its config alone: built and run without weights, on the meta device."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress.plugins.diffusion.sampling_settings import import_diffusers
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from diffusers import ModelMixin


_FP32_BYTES = 4
_TOKENS = 77
_SDXL_SIZES = 6
"""Numbers that SDXL's UNet is told of the picture's size."""


@dataclass(frozen=True)
class PartCosts:
    """Of one call with the batch and size that it was computed for.

    ``multiplications`` are those of convolutions, linear layers and attention, in FLOPs half as many. The values that
    are alive at once beside the weights: ``working_values`` where attention is computed in pieces, as torch and CUDA's
    kernels do, ``stored_attention_values`` where its matrices are stored, as ONNX Runtime does on processors.
    """

    parameters: int
    multiplications: int
    working_values: int
    stored_attention_values: int

    def memory_bytes(self, bits: int, stored_attention: bool = False) -> int:
        """Weights and all that is alive at the peak, in floats of so many bits."""
        alive = self.stored_attention_values if stored_attention else self.working_values
        return (self.parameters + alive) * bits // 8


def part_costs(config: Mapping[str, Any], batch: int = 1, size: int | None = None, tokens: int = _TOKENS) -> PartCosts:
    """Of a UNet, or of the decoder of an `AutoencoderKL` or `AutoencoderTiny`, whose config.json is ``config``.

    ``size`` is the side of the latents, by default the UNet's ``sample_size``, or what the VAE makes its own of; a
    UNet is called once, as for one step without guidance. Raises `ModelError` for other parts.
    """
    part = hollow_part(config)
    call = _call(part, batch, size, tokens)
    return PartCosts(
        parameters(part), _multiplications(call), *(_peak_values(part, call, fused) for fused in (True, False))
    )


def costs_of(part: Any, size: int | None = None) -> PartCosts:
    """Of a part that is there, for one picture, by its config: see `part_costs`."""
    return part_costs({**part.config, "_class_name": type(part).__name__}, size=size)


def cost_rows(before: PartCosts, after: PartCosts) -> list[tuple[str, float, float]]:
    """Figures for a table: of a call before and after a cut."""
    rows = [
        ("parameters", float(before.parameters), float(after.parameters)),
        ("multiplications", float(before.multiplications), float(after.multiplications)),
    ]
    for bits in (32, 16):
        first, second = (round(one.memory_bytes(bits) / 1e6, 2) for one in (before, after))
        rows.append((f"memory in fp{bits}, MB", first, second))
    return rows


def hollow_part(config: Mapping[str, Any]) -> ModelMixin:
    """The module of a diffusers config.json without weights. Raises `ModelError` where diffusers has none for it.

    What its class has no field for is passed over, as diffusers does.
    """
    diffusers = import_diffusers()
    name = str(config.get("_class_name"))
    made: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    known = isinstance(made, type) and issubclass(made, diffusers.ModelMixin)
    if not known:
        raise ModelError(
            f"diffusers has no model {name!r}.",
            where="config.json: _class_name",
            expected="a class of diffusers' models",
        )
    try:
        known_fields = inspect.signature(made.__init__).parameters
        with torch.device("meta"):
            return made.from_config({field: value for field, value in config.items() if field in known_fields})
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ModelError(
            f"diffusers makes no {name} of this config: {first_line(error)}", where="config.json"
        ) from error


def parameters(part: nn.Module) -> int:
    """How many a module has."""
    return sum(parameter.numel() for parameter in part.parameters())


def multiplications(part: nn.Module) -> int:
    """Of one call of a UNet or a VAE's decoder on the meta device, for one picture of its own size."""
    return _multiplications(_call(part, 1, None, _TOKENS))


def _multiplications(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        call()
    return int(counted.get_total_flops()) // 2


def _call(part: Any, batch: int, size: int | None, tokens: int) -> Callable[[], Any]:
    config, kind = part.config, type(part).__name__

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    if kind in ("AutoencoderKL", "AutoencoderTiny"):
        side = size or (config.get("sample_size") or 512) // 2 ** (len(config.block_out_channels) - 1)
        latents = zeros(batch, config.latent_channels, side, side)
        return lambda: part.decode(latents, return_dict=False)
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise ModelError(
            f"The cost of a {kind} is not predicted.",
            where="config.json: _class_name",
            expected="UNet2DConditionModel, UNet2DModel, AutoencoderKL or AutoencoderTiny",
        )
    side = size or config.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    arguments: dict[str, Any] = {}
    if kind == "UNet2DConditionModel":
        text = config.encoder_hid_dim or config.cross_attention_dim
        text = text if isinstance(text, int) else text[0]
        arguments["encoder_hidden_states"] = zeros(batch, tokens, text)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _SDXL_SIZES * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": zeros(batch, pooled), "time_ids": zeros(batch, _SDXL_SIZES)}
    if config.get("num_class_embeds") or config.get("class_embed_type") == "timestep":
        arguments["class_labels"] = torch.zeros(batch, dtype=torch.long, device="meta")
    sample = zeros(batch, config.in_channels, height, width)
    timestep = torch.zeros(batch, dtype=torch.long, device="meta")
    return lambda: part(sample, timestep, **arguments, return_dict=False)


def _peak_values(part: nn.Module, call: Callable[[], Any], fused: bool) -> int:
    """How many values are alive at once, beside weights and inputs, while eager torch makes the call."""
    alive = _Alive(part)
    with torch.no_grad(), _FusedAttention(fused), alive:
        call()
    return alive.peak_bytes // _FP32_BYTES


class _FusedAttention(TorchFunctionMode):
    """Attention makes its output and nothing else, if it is ``fused``."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self._fused = fused

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._fused and function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators make, until they are freed."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = [*part.parameters(), *part.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in held}
        self._held = held
        self._bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._bytes -= size
