"""The parts of a model that draws pictures as graphs: names and folders of optimum, answers of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_pipelines import pipeline_folder

from compress.formats.onnx.export import ExportedGraph
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.plugins.diffusion.onnx_export import export_diffusion, verify_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.utils.errors import IntegrityError

PROMPTS = ["a bag", "the small dark boot of a photo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GeneratorModel:
    return load_pipeline(pipeline_folder(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def exported(model: GeneratorModel) -> dict[str, ExportedGraph]:
    return export_diffusion(model, model.processor.ids(PROMPTS), None, True)


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values
    }


def test_inputs_and_outputs_are_those_that_optimum_feeds_and_reads(exported: dict[str, ExportedGraph]) -> None:
    # optimum.onnxruntime.modeling_diffusion: ORTTextEncoder, ORTUnet (a scalar timestep), ORTVaeDecoder.
    assert list(exported) == ["text_encoder", "unet", "vae_decoder"]
    text, unet, decoder = (part.graph.graph for part in exported.values())
    assert shapes(text.input) == {"input_ids": ["batch_size", "sequence_length"]}
    # diffusers takes the first output of a text encoder.
    assert next(iter(shapes(text.output).items())) == ("last_hidden_state", ["batch_size", "sequence_length", 16])
    sides = ["batch_size", 4, "height", "width"]
    texts = ["batch_size", "sequence_length", 16]
    assert shapes(unet.input) == {"sample": sides, "timestep": [], "encoder_hidden_states": texts}
    assert shapes(unet.output) == {"out_sample": sides}
    assert shapes(decoder.input) == {"latent_sample": sides}
    assert shapes(decoder.output) == {"sample": ["batch_size", 1, "2*height", "2*width"]}


def test_tensors_are_named_as_in_the_torch_model(model: GeneratorModel, exported: dict[str, ExportedGraph]) -> None:
    torch_names = set(model.tensors())
    stored = [tensor.name for part in exported.values() for tensor in part.graph.graph.initializer]
    assert len(stored) == len(set(stored))
    assert {"unet.conv_in.weight", "vae.decoder.conv_out.weight", "text_encoder.pooler.dense.bias"} <= set(
        stored
    ) & torch_names


@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 8, 8, 12), (2, 6, 14, 12), (5, 2, 4, 3)])
def test_the_denoiser_answers_as_torch_at_any_size(
    model: GeneratorModel, exported: dict[str, ExportedGraph], batch: int, height: int, width: int, tokens: int
) -> None:
    torch.manual_seed(1)
    sample, text = torch.randn(batch, 4, height, width), torch.randn(batch, tokens, 16)
    when = torch.tensor(33.0)
    with torch.inference_mode():
        expected = model.parts["unet"](sample, when, text)[0].numpy()
    feed = {"sample": sample.numpy(), "timestep": when.numpy(), "encoder_hidden_states": text.numpy()}
    actual = session_of(exported["unet"].graph).predict(feed)["out_sample"]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_graph_that_differs_is_named(model: GeneratorModel, exported: dict[str, ExportedGraph]) -> None:
    graphs = {name: item.graph for name, item in exported.items()}
    ids = model.processor.ids(PROMPTS)
    assert max(item.worst for item in verify_diffusion(model, graphs, ids, 1e-3).values()) < 1e-4
    changed = onnx.ModelProto()
    changed.CopyFrom(graphs["vae_decoder"])
    weight = next(item for item in changed.graph.initializer if item.name == "vae.decoder.conv_out.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 0.1, weight.name))
    with pytest.raises(IntegrityError, match="vae_decoder differs from torch by 1"):
        verify_diffusion(model, {**graphs, "vae_decoder": changed}, ids, 1e-3)


@pytest.mark.slow
def test_a_denoiser_that_is_told_of_the_guidance_becomes_a_graph(tmp_path: Path) -> None:
    model = load_pipeline(pipeline_folder(tmp_path, time_cond_proj_dim=8))
    ids = model.processor.ids(PROMPTS)
    graphs = {name: item.graph for name, item in export_diffusion(model, ids, None, True).items()}
    assert shapes(graphs["unet"].graph.input)["timestep_cond"] == ["batch_size", 8]
    assert max(item.worst for item in verify_diffusion(model, graphs, ids, 1e-3).values()) < 1e-4
