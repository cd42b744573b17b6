"""Export of a diffusion model's parts as ONNX graphs, in the folders and with the names that optimum opens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx
import torch
from torch import nn

from compress.formats.onnx.export import Axes, ExportedGraph, export_onnx, export_part
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.parity import Distance, distance
from compress.models.model import TorchModel, write_companions
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.pipeline_model import TEXT_ENCODER, VAE, GeneratorModel
from compress.plugins.diffusion.sampler import (
    CONDITION,
    DECODER,
    DENOISED,
    HIDDEN,
    IDS,
    IMAGE,
    LATENT,
    OUTPUTS,
    SAMPLE,
    TEXT,
    TIMESTEP,
    DiffusionSession,
    LatentSpace,
    open_session,
    open_torch,
)
from compress.stages.base import Context
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


_BATCH = "batch_size"
_SIDES = {0: _BATCH, 2: "height", 3: "width"}
_AXES: Axes = {
    SAMPLE: _SIDES,
    TIMESTEP: {},
    TEXT: {0: _BATCH, 1: "sequence_length"},
    CONDITION: {0: _BATCH},
    LATENT: _SIDES,
}
_WHEN = 501.0
"""Timestep at which parts are traced and compared."""
_SEED = 0
_PROMPTS = 4
"""Number of training prompts that components are traced and compared on."""


class _Denoiser(nn.Module):
    """Denoiser that takes and returns tensors by name.

    The part is a child with its own name, so that tensors are named as those of the whole model.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {DENOISED: self.unet(**inputs, return_dict=False)[0]}


class _Decoder(nn.Module):
    """Half of a VAE that decodes latents to images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae: Any = nn.Module()
        # An AutoencoderTiny has no convolution before its decoder.
        post_quant_conv: Any = getattr(vae, "post_quant_conv", None)
        self.vae.post_quant_conv, self.vae.decoder = post_quant_conv, vae.decoder

    def forward(self, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        post_quant_conv = self.vae.post_quant_conv
        return {IMAGE: self.vae.decoder(latent_sample if post_quant_conv is None else post_quant_conv(latent_sample))}


class _Hidden:
    """A `Head` that returns the last hidden state of each token."""

    outputs: ClassVar[tuple[str, ...]] = (HIDDEN,)
    answer: ClassVar[str] = "hidden"
    answer_label: ClassVar[str] = "hidden states"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the hidden states [batch, tokens, width]."""
        return outputs[HIDDEN]


_Part = tuple[nn.Module, Mapping[str, torch.Tensor]]
"""A module, and sample inputs by name."""


def export_diffusion(
    model: GeneratorModel, ids: np.ndarray, opset: int | None, fusions: bool
) -> dict[str, ExportedGraph]:
    """Export `text_encoder`, `unet` and `vae_decoder`, in the order in which they run.

    Args:
        model: The diffusion model.
        ids: Token ids of prompts [n, tokens], with n at least 2.
        opset: ONNX operator set, or None for the exporter's default.
        fusions: Whether to fuse operators for ONNX Runtime's CPU kernels.

    Returns:
        The exported graph by part. Batch, image sides and number of tokens are dynamic.

    Raises:
        StageError: A part cannot be exported.
    """
    text = TorchModel(model.parts[TEXT_ENCODER], model.tokenizer)
    prompts = [{IDS: row} for row in (ids[0], ids[-1, : ids.shape[1] // 2 + 1])]
    examples = Examples(prompts, {IDS: model.tokenizer.pad_token_id or 0}, head=_Hidden())
    exports = {TEXT_ENCODER: export_onnx(text, examples, opset, fusions)}
    # All sizes differ, so that tracing does not take two axes for the same one.
    multiple = _multiple(model)
    for name, part in _parts(model, 2, 2 * multiple, 3 * multiple, 5).items():
        multiples = dict.fromkeys(("height", "width"), multiple if name == UNET else 1)
        exports[name] = export_part(*part, _AXES, multiples, opset, fusions)
    # Stored tensors get the names that they have in the whole model.
    for name, exported in exports.items():
        graph, prefix = exported.graph.graph, f"{VAE if name == DECODER else name}."
        others = [tensor for tensor in graph.initializer if not tensor.name.startswith(prefix)]
        names = {tensor.name: prefix + tensor.name for tensor in others}
        for tensor in others:
            tensor.name = names[tensor.name]
        for node in graph.node:
            node.input[:] = [names.get(read, read) for read in node.input]
    return exports


def verify_diffusion(
    model: GeneratorModel, graphs: Mapping[str, onnx.ModelProto], ids: np.ndarray, tolerance: float
) -> dict[str, Distance]:
    """Compare each graph with torch, at the model's own size and others, single and in batches.

    Args:
        model: The diffusion model.
        graphs: The graph by part.
        ids: Token ids of prompts [n, tokens].
        tolerance: Largest accepted difference, or share of the largest answer above 1.

    Returns:
        Distance between graph and torch by part.

    Raises:
        IntegrityError: An answer differs by more than ``tolerance``.
    """
    size, multiple = model.processor.noise_shape[1:], _multiple(model)
    # (rows, height, width, tokens) of each comparison.
    sizes = [(1, *size, ids.shape[1]), (3, 4 * multiple, 2 * multiple, ids.shape[1]), (2, multiple, multiple, 3)]
    distances = {}
    for name, graph in graphs.items():
        session, pairs = session_of(graph), []
        if name == TEXT_ENCODER:
            cases: list[_Part] = [
                (model.parts[TEXT_ENCODER], {IDS: torch.from_numpy(rows)}) for rows in (ids[:1], ids[:, :-1])
            ]
        else:
            cases = [_parts(model, *case_size)[name] for case_size in sizes]
        for module, inputs in cases:
            with torch.inference_mode():
                expected = module(**inputs)[OUTPUTS[name]]
            answers = session.predict({key: value.numpy() for key, value in inputs.items()})
            pairs.append((expected.numpy(), answers[OUTPUTS[name]]))
        error = distances[name] = distance(pairs)
        if not error.worst <= tolerance * max(1.0, error.largest):
            raise IntegrityError(
                f"The graph of {name} differs from torch by {error.worst:.2e}; the largest is {error.largest:.1f}.",
                expected=f"at most {tolerance:g} of it, at all sizes and batches",
                hint="set fusions: false, try another opset, or raise tolerance if the difference is acceptable",
            )
    return distances


def open_diffusion(model: OnnxModel) -> DiffusionSession:
    """Open the graphs of ``model`` on the processor as a session that generates images."""
    with tempfile.TemporaryDirectory() as folder:
        write_companions(Path(folder), model.companions)
        return open_session([session_of(graph, alone=False) for graph in model.graphs.values()], Path(folder))


def diffusion_folder(model: GeneratorModel, graphs: Mapping[str, onnx.ModelProto]) -> OnnxModel:
    """Return the graphs with all companion files, each part's config in its folder where optimum reads it.

    Raises:
        StageError: The model has parts that cannot be exported.
    """
    unwritten = [name for name, folder in model.other_components.items() if any(folder.glob("*.safetensors"))]
    if unwritten:
        raise StageError(
            f"{', '.join(unwritten)} cannot be exported.",
            where="onnx",
            expected="a text encoder, a denoiser and a VAE",
            hint="write `safety_checker: leave_out` into the recipe, and see to what is shown to people yourself",
        )
    companions = model.companions()
    for name, folder in model.other_components.items():
        companions |= {f"{name}/{file.name}": file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for name in graphs:
        part = model.parts[VAE if name == DECODER else name]
        with tempfile.TemporaryDirectory() as scratch:
            # diffusers' modules write their own, those of transformers have one that writes itself.
            part.save_config(scratch) if hasattr(part, "save_config") else part.config.save_pretrained(scratch)
            config = json.loads((Path(scratch) / "config.json").read_text())
        # The path that the part was read from is not of interest.
        config.pop("_name_or_path", None)
        companions[f"{name}/config.json"] = json.dumps(config, indent=2).encode()
    files = {f"{name}/{FLOAT_GRAPH}": graph for name, graph in graphs.items()}
    (first, graph), *others = files.items()
    return OnnxModel(graph, first, companions, dict(others))


def _multiple(model: GeneratorModel) -> int:
    """Return the number of which the sides of latents are multiples."""
    return LatentSpace.from_configs(model.parts[UNET].config, model.parts[VAE].config).multiple


def _parts(model: GeneratorModel, count: int, height: int, width: int, tokens: int) -> dict[str, _Part]:
    """Return the denoiser and the decoder with standard normal inputs.

    Args:
        model: The diffusion model.
        count: Rows of the batch.
        height: Height of the latents.
        width: Width of the latents.
        tokens: Number of text tokens.
    """
    random = torch.Generator().manual_seed(_SEED)
    unet, vae = model.parts[UNET], model.parts[VAE]
    latents = torch.randn((count, unet.config.in_channels, height, width), generator=random)
    text = torch.randn((count, tokens, unet.config.cross_attention_dim), generator=random)
    denoiser_inputs = {SAMPLE: latents, TIMESTEP: torch.tensor(_WHEN), TEXT: text}
    condition = LatentSpace.from_configs(unet.config, vae.config).condition
    if condition:
        denoiser_inputs[CONDITION] = torch.randn((count, condition), generator=random)
    decoded = {LATENT: torch.randn((count, vae.config.latent_channels, height, width), generator=random)}
    return {UNET: (_Denoiser(unet), denoiser_inputs), DECODER: (_Decoder(vae), decoded)}


def write_onnx(
    model: GeneratorModel, context: Context, opset: int | None, fusions: bool, tolerance: float
) -> OnnxModel:
    """Export the components to ONNX and compare each with torch at several sizes and batches.

    Args:
        model: Model to export.
        context: Context of the stage, whose training prompts are used.
        opset: ONNX operator set; None is the exporter's newest.
        fusions: Whether to fuse operators into those of ONNX Runtime.
        tolerance: Largest accepted difference from torch.

    Raises:
        IntegrityError: A component differs from torch by more than ``tolerance``.
    """
    ids = model.processor.ids(_prompts(context))
    exported = export_diffusion(model, ids, opset, fusions)
    graphs = {name: component.graph for name, component in exported.items()}
    for name, difference in verify_diffusion(model, graphs, ids, tolerance).items():
        context.note(f"onnx: {name} differs by at most {difference.worst:.1e} from torch, at all sizes and batches")
        if exported[name].unfused:
            context.note(f"onnx: {name}: {exported[name].unfused}")
    return diffusion_folder(model, graphs)


def graphs_to_convert(
    model: GeneratorModel | OnnxModel, context: Context
) -> tuple[OnnxModel, DiffusionSession, Literal["torch", "the graphs"]]:
    """Return graphs for another format, a session that computes the reference, and the name of what computes it."""
    if isinstance(model, OnnxModel):
        return model, open_diffusion(model), "the graphs"
    exported = export_diffusion(model, model.processor.ids(_prompts(context)), None, fusions=False)
    graphs = diffusion_folder(model, {name: component.graph for name, component in exported.items()})
    return graphs, open_torch(model, {}), "torch"


def _prompts(context: Context) -> list[str]:
    prompts: list[str] = context.data.split("train").slice(0, _PROMPTS)["text"].to_pylist()
    return prompts
