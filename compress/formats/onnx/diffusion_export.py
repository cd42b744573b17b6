"""The parts of a model that draws pictures as graphs, in the folders and by the names that optimum opens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch import nn

from compress.formats.onnx.export import Axes, Exported, export_onnx, export_part
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.prove import Distance, distance
from compress.models.diffusion_checks import UNET
from compress.models.diffusion_pipeline import TEXT_ENCODER, VAE, GeneratorModel
from compress.models.model import write_companions
from compress.models.torch_model import TorchModel
from compress.runtimes.picture_sampler import (
    CONDITION,
    DENOISED,
    HIDDEN,
    IDS,
    LATENT,
    PICTURE,
    SAMPLE,
    TEXT,
    TIMESTEP,
    Latents,
)
from compress.runtimes.picture_session import DECODER, PictureSession, open_pictures
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError

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
"""The timestep that parts are traced and proven at."""
_SEED = 0


class _Denoiser(nn.Module):
    """The part is a child by its own name, so that tensors are named as those of the whole model."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        return {DENOISED: self.unet(**given, return_dict=False)[0]}


class _Decoder(nn.Module):
    """That half of a VAE which makes pictures."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = nn.Module()
        # An AutoencoderTiny has no convolution before its decoder.
        before: Any = getattr(vae, "post_quant_conv", None)
        self.vae.post_quant_conv, self.vae.decoder = before, vae.decoder

    def forward(self, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        before = self.vae.post_quant_conv
        return {PICTURE: self.vae.decoder(latent_sample if before is None else before(latent_sample))}


@dataclass(frozen=True)
class _Hidden:
    """A `Head`: what the last layer makes of each token."""

    outputs: ClassVar[tuple[str, ...]] = (HIDDEN,)
    answer: ClassVar[str] = "hidden"
    many: ClassVar[str] = "hidden states"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[batch, tokens, width]."""
        return outputs[HIDDEN]


@dataclass(frozen=True)
class _Part:
    """What a graph is made of: a module, its inputs of a size, and the free axes."""

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]

    def answer(self) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            found: dict[str, torch.Tensor] = self.module(**self.inputs)
        return found


def export_drawing(model: GeneratorModel, ids: np.ndarray, opset: int | None, fusions: bool) -> dict[str, Exported]:
    """`text_encoder`, `unet` and `vae_decoder`, in the order in which they run.

    ``ids`` are prompts [n, tokens], two at least. Batch, sides and the number of tokens are free. Raises `StageError`.
    """
    text = TorchModel(model.parts[TEXT_ENCODER], model.tokenizer)
    prompts = [{IDS: row} for row in (ids[0], ids[-1, : ids.shape[1] // 2 + 1])]
    examples = Examples(prompts, {IDS: model.tokenizer.pad_token_id or 0}, head=_Hidden())
    found = {TEXT_ENCODER: export_onnx(text, examples, opset, fusions)}
    multiple = _multiple(model)
    for name, part in _parts(model, 2, 2 * multiple, 3 * multiple, 5).items():
        multiples = dict.fromkeys(("height", "width"), multiple if name == UNET else 1)
        found[name] = export_part(part.module, part.inputs, _AXES, multiples, opset, fusions)
    for name, exported in found.items():
        _prefix(exported.graph.graph, VAE if name == DECODER else name)
    return found


def prove_drawing(
    model: GeneratorModel, graphs: Mapping[str, Any], ids: np.ndarray, tolerance: float
) -> dict[str, Distance]:
    """How far each graph's answers are from torch's, at the model's own size and others, one by one and in batches.

    Raises `IntegrityError` where an answer differs by more than ``tolerance``, or that share of the largest above 1.
    """
    size, multiple = model.processor.noise_shape[1:], _multiple(model)
    sizes = [(1, *size, ids.shape[1]), (3, 4 * multiple, 2 * multiple, ids.shape[1]), (2, multiple, multiple, 3)]
    found = {}
    for name, graph in graphs.items():
        session, pairs = session_of(graph), []
        cases = (
            [_Part(_Encoder(model.parts[TEXT_ENCODER]), {IDS: torch.from_numpy(one)}) for one in (ids[:1], ids[:, :-1])]
            if name == TEXT_ENCODER
            else [_parts(model, *each)[name] for each in sizes]
        )
        for case in cases:
            answers = session.predict({key: value.numpy() for key, value in case.inputs.items()})
            pairs += [(value.numpy(), answers[key]) for key, value in case.answer().items()]
        apart = found[name] = distance(pairs)
        if not apart.worst <= tolerance * max(1.0, apart.largest):
            raise IntegrityError(
                f"The graph of {name} differs from torch by {apart.worst:.2e}; the largest is {apart.largest:.1f}.",
                expected=f"at most {tolerance:g} of it, at all sizes and batches",
                hint="set fusions: false, try another opset, or raise tolerance if the difference is acceptable",
            )
    return found


def open_drawing(model: OnnxModel) -> PictureSession:
    """Draw with the graphs of ``model``, on the processor."""
    with tempfile.TemporaryDirectory() as folder:
        write_companions(Path(folder), model.companions)
        return open_pictures([session_of(graph, alone=False) for graph in model.graphs.values()], Path(folder))


def drawing_folder(model: GeneratorModel, graphs: Mapping[str, onnx.ModelProto]) -> OnnxModel:
    """The graphs with all that belongs to them, each part's config in its folder as optimum reads it.

    Raises `StageError` for a model with parts that no graph is made of.
    """
    unwritten = [name for name, folder in model.kept.items() if any(folder.glob("*.safetensors"))]
    if unwritten:
        raise StageError(
            f"No graph is made of {', '.join(unwritten)}.",
            where="export",
            expected="a text encoder, a denoiser and a VAE",
            hint="write `safety_checker: leave_out` into the recipe, and see to what is shown to people yourself",
        )
    companions = model.companions()
    for name, folder in model.kept.items():
        companions |= {f"{name}/{file.name}": file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for name in graphs:
        part = model.parts[VAE if name == DECODER else name]
        companions[f"{name}/config.json"] = _config(part)
    files = {f"{name}/{FLOAT_GRAPH}": graph for name, graph in graphs.items()}
    (first, graph), *others = files.items()
    return OnnxModel(graph, first, companions, dict(others))


def _config(part: Any) -> bytes:
    """A part's config.json, without where it was read from."""
    with tempfile.TemporaryDirectory() as folder:
        # diffusers' modules write their own, those of transformers have one that writes itself.
        part.save_config(folder) if hasattr(part, "save_config") else part.config.save_pretrained(folder)
        said = json.loads((Path(folder) / "config.json").read_text())
    return json.dumps({name: value for name, value in said.items() if name != "_name_or_path"}, indent=2).encode()


class _Encoder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {HIDDEN: self.part(input_ids)[0]}


def _prefix(graph: onnx.GraphProto, prefix: str) -> None:
    """Name the stored tensors as those of the whole model are, in place."""
    others = [tensor for tensor in graph.initializer if not tensor.name.startswith(f"{prefix}.")]
    names = {tensor.name: f"{prefix}.{tensor.name}" for tensor in others}
    for tensor in others:
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _multiple(model: GeneratorModel) -> int:
    return Latents.of(model.parts[UNET].config, model.parts[VAE].config).multiple


def _parts(model: GeneratorModel, count: int, height: int, width: int, tokens: int) -> dict[str, _Part]:
    """The denoiser and the decoder with inputs drawn from a standard normal."""
    random = torch.Generator().manual_seed(_SEED)
    unet, vae = model.parts[UNET], model.parts[VAE]
    latents = torch.randn((count, unet.config.in_channels, height, width), generator=random)
    text = torch.randn((count, tokens, unet.config.cross_attention_dim), generator=random)
    given = {SAMPLE: latents, TIMESTEP: torch.tensor(_WHEN), TEXT: text}
    condition = Latents.of(unet.config, vae.config).condition
    if condition:
        given[CONDITION] = torch.randn((count, condition), generator=random)
    decoded = {LATENT: torch.randn((count, vae.config.latent_channels, height, width), generator=random)}
    return {UNET: _Part(_Denoiser(unet), given), DECODER: _Part(_Decoder(vae), decoded)}
