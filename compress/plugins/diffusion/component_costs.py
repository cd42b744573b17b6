"""Costs of a pipeline component, computed from its config by running it without weights on the meta device."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compress.inspection.budget import PartCall
from compress.models.json_file import read_json
from compress.models.pipeline_folder import UNET, is_pipeline
from compress.plugins.diffusion.pipeline_model import import_diffusers
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from diffusers import ModelMixin

_FP32_BYTES = 4
_TOKENS = 77
_SDXL_SIZES = 6
"""Number of sizes and crop coordinates of the image that SDXL's UNet takes as an input."""
_COMPONENTS = (UNET, "vae", "vae_decoder")


@dataclass(frozen=True)
class ComponentCosts:
    """Costs of one call with a certain batch and size.

    ``multiplications`` are those of convolutions, linear layers and attention: half the FLOPs. The other two are the
    values that are alive at once beside the weights. ``working_values`` assumes fused attention, as in torch and CUDA
    kernels. ``stored_attention_values`` assumes stored attention matrices, as in ONNX Runtime on CPUs.
    """

    parameters: int
    multiplications: int
    working_values: int
    stored_attention_values: int

    def memory_bytes(self, bits: int, stored_attention: bool = False) -> int:
        """Return the peak of weights and values in floats of ``bits`` bits."""
        alive = self.stored_attention_values if stored_attention else self.working_values
        return (self.parameters + alive) * bits // 8


def component_calls(folder: Path) -> tuple[PartCall, ...]:
    """Predict the cost of one call of each component, whatever format its weights are stored in.

    Raises:
        ModelError: ``folder`` is no pipeline, or the cost of its denoiser cannot be predicted.
    """
    if not is_pipeline(folder):
        raise ModelError(
            "The cost of a call is predicted for the parts of a pipeline.",
            where=str(folder),
            expected="a folder in diffusers' layout, with model_index.json",
            hint="measure it: compress bench, or compress profile",
        )
    files = {name: path for name in _COMPONENTS if (path := folder / name / "config.json").is_file()}
    configs = {name: read_json(path) for name, path in files.items()}
    side = configs.get(UNET, {}).get("sample_size")
    calls = []
    for name, config in configs.items():
        costs = component_costs(config, size=side if isinstance(side, int) else None)
        calls.append(
            PartCall(
                part=name,
                parameters=costs.parameters,
                multiplications=costs.multiplications,
                fp32_bytes=costs.memory_bytes(32),
                fp16_bytes=costs.memory_bytes(16),
                fp32_stored_attention_bytes=costs.memory_bytes(32, stored_attention=True),
            )
        )
    return tuple(calls)


def component_costs(
    config: Mapping[str, Any], batch: int = 1, size: int | None = None, tokens: int = _TOKENS
) -> ComponentCosts:
    """Predict the costs of a UNet, or of the decoder of an `AutoencoderKL` or `AutoencoderTiny`.

    Args:
        config: Content of the component's config.json.
        batch: Number of images. A UNet is called once, as for one step without guidance.
        size: Side of the latents; by default the UNet's ``sample_size``, or that of the VAE's own images.
        tokens: Number of text tokens.

    Raises:
        ModelError: The component is of another class.
    """
    component = build_component_on_meta(config)
    call = _component_call(component, batch, size, tokens)
    # The largest number of values alive at once, beside weights and inputs, in eager torch.
    peaks = []
    for attention in (_FusedAttention(), nullcontext()):
        tracker = MemoryTracker(component)
        with torch.no_grad(), attention, tracker:
            call()
        peaks.append(tracker.peak_bytes // _FP32_BYTES)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return ComponentCosts(count_parameters(component), int(counter.get_total_flops()) // 2, *peaks)


def costs_of_component(component: ModelMixin, size: int | None = None) -> ComponentCosts:
    """Predict the costs of a loaded component for one image: see `component_costs`."""
    return component_costs({**component.config, "_class_name": type(component).__name__}, size=size)


def cost_rows(before: ComponentCosts, after: ComponentCosts) -> list[tuple[str, float, float]]:
    """Return rows of a table that compares a call before and after pruning."""
    rows = [
        ("parameters", float(before.parameters), float(after.parameters)),
        ("multiplications", float(before.multiplications), float(after.multiplications)),
    ]
    for bits in (32, 16):
        old, new = (round(costs.memory_bytes(bits) / 1e6, 2) for costs in (before, after))
        rows.append((f"memory in fp{bits}, MB", old, new))
    return rows


def build_component_on_meta(config: Mapping[str, Any]) -> ModelMixin:
    """Build the module of a diffusers config.json without weights.

    Fields that the class does not have are ignored, as diffusers does.

    Raises:
        ModelError: diffusers has no such model, or the config does not fit it.
    """
    diffusers = import_diffusers()
    name = str(config.get("_class_name"))
    component_class = getattr(diffusers, name, None) if name.isidentifier() else None
    if not inspect.isclass(component_class) or not issubclass(component_class, diffusers.ModelMixin):
        raise ModelError(
            f"diffusers has no model {name!r}.",
            where="config.json: _class_name",
            expected="a class of diffusers' models",
        )
    try:
        fields = inspect.signature(component_class).parameters
        with torch.device("meta"):
            model: ModelMixin = cast(Any, component_class).from_config(
                {field: value for field, value in config.items() if field in fields}
            )
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        message = f"diffusers makes no {name} of this config: {first_line(error)}"
        raise ModelError(message, where="config.json") from error
    return model


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _component_call(component: ModelMixin, batch: int, size: int | None, tokens: int) -> Callable[[], object]:
    """Return a call of the component with inputs of zeros on the meta device."""
    config, class_name = component.config, type(component).__name__

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    if class_name in ("AutoencoderKL", "AutoencoderTiny"):
        side = size or (config.get("sample_size") or 512) // 2 ** (len(config.block_out_channels) - 1)
        latents = zeros(batch, config.latent_channels, side, side)
        return lambda: component.decode(latents, return_dict=False)
    if class_name != "UNet2DConditionModel":
        raise ModelError(
            f"The cost of a {class_name} is not predicted.",
            where="config.json: _class_name",
            expected="UNet2DConditionModel, AutoencoderKL or AutoencoderTiny",
        )
    side = size or config.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    text = config.encoder_hid_dim or config.cross_attention_dim
    text_states = zeros(batch, tokens, text if isinstance(text, int) else text[0])
    arguments: dict[str, object] = {"encoder_hidden_states": text_states}
    if config.get("addition_embed_type") == "text_time":
        # SDXL concatenates the pooled text embedding and the embedded sizes of the image.
        pooled = config.projection_class_embeddings_input_dim - _SDXL_SIZES * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": zeros(batch, pooled), "time_ids": zeros(batch, _SDXL_SIZES)}
    sample = zeros(batch, config.in_channels, height, width)
    timestep = torch.zeros(batch, dtype=torch.long, device="meta")
    return lambda: component(sample, timestep, **arguments, return_dict=False)


class _FusedAttention(TorchFunctionMode):
    """Mode in which attention allocates only its output."""

    def __torch_function__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that counts the bytes of the storages that operators allocate, until they are freed."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # References keep the storages of weights alive, so that their addresses are not reused.
        self._weights = [*component.parameters(), *component.buffers()]
        self._addresses = {tensor.untyped_storage()._cdata for tensor in self._weights}
        self._bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._addresses:
            return
        self._addresses.add(address)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._addresses.discard(address)
        self._bytes -= size
