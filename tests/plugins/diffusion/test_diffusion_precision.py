"""Tests of INT8, float16 and OpenVINO conversion of a diffusion pipeline's components, against the float graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from onnx import numpy_helper
from stage_context import stage_context
from tiny_pipelines import WORDS, pipeline_folder

from compress.data.dataset import Dataset
from compress.formats.onnx.export import ExportedGraph
from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.onnxruntime import session_of
from compress.formats.openvino.model import OpenVinoModel
from compress.formats.openvino.stage import OpenVino
from compress.formats.runtime import Batch, TensorType, open_model
from compress.models.processor import processor_of
from compress.plugins.diffusion.calibration import TIMESTEPS, count_prompts, record_inputs
from compress.plugins.diffusion.image_metrics import ssim
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion, open_diffusion, verify_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, Sampling, load_pipeline
from compress.plugins.diffusion.sampler import (
    DiffusionSampler,
    DiffusionSession,
    LatentSpace,
)
from compress.stages.base import Context
from compress.stages.cast import Cast
from compress.stages.onnx_int8.quantizer import LAYERS, METADATA
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.registry import TASKS
from compress.utils.errors import IntegrityError

pytestmark = pytest.mark.slow

UNET, DECODER = "unet/model.onnx", "vae_decoder/model.onnx"
TASK = TASKS["text-to-image"]


PROMPTS = ["a bag", "the small dark boot of a photo"]


@pytest.fixture(scope="module")
def model(generator: GeneratorModel) -> OnnxModel:
    exported = export_diffusion(generator, generator.processor.ids(PROMPTS), None, fusions=False)
    graphs = {name: part.graph for name, part in exported.items()}
    return diffusion_folder(replace(generator, sampling=Sampling(4, 2.0)), graphs)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    prompts = [f"a {WORDS[9 + row % 4]} {WORDS[3 + row % 2]}" for row in range(12)]
    rows = pa.table({"text": prompts, "label": [WORDS[3 + row % 2] for row in range(12)]})
    data = Dataset(TASK.columns, {"train": rows, "validation": rows.slice(0, 2)}, ())
    return stage_context("text-to-image", data, scratch=tmp_path / "scratch")


def validation_batch(model: OnnxModel, context: Context) -> Batch:
    return TASK.encode(context.data.split("validation"), processor_of(model), None, 24).batch([0, 1])


def drawn(model: OnnxModel, context: Context) -> np.ndarray:
    return open_diffusion(model).predict(validation_batch(model, context))["pictures"]


def metadata(graph: onnx.ModelProto, key: str) -> dict[str, object]:
    (value,) = (json.loads(entry.value) for entry in graph.metadata_props if entry.key == key)
    return value


def test_int8_denoiser_is_calibrated_on_all_timesteps(model: OnnxModel, context: Context) -> None:
    stage = OnnxInt8(part="unet", method="static", split_concatenations=True, calibration_examples=24)  # type: ignore[arg-type]
    result = stage.run(model, context)
    # 24 examples are 3 prompts x 4 steps x 2 rows (guidance); Stable Diffusion's timesteps are offset by one.
    record = metadata(result.graphs[UNET], METADATA)
    assert (record["prompts"], record["timesteps"], record["guidance"]) == (3, [751.0, 501.0, 251.0, 1.0], 2.0)
    others = [name for name in model.graphs if name != UNET]
    assert [result.graphs[name] for name in others] == [model.graphs[name] for name in others]
    # The shortcuts of both resnets in each up block read a concatenation.
    names = [node.name for node in result.graphs[UNET].graph.node if node.op_type == "Conv"]
    shortcuts = {name.partition("/part_")[0] for name in names if "/part_" in name}
    assert len(shortcuts) == 4
    assert sum("/part_" in name for name in names) == 8
    stored = [tensor.data_type for tensor in result.graphs[UNET].graph.initializer]
    assert stored.count(onnx.TensorProto.INT8) >= len(names)
    assert "4 convolutions split by their concatenated inputs" in " ".join(context.notes)
    assert ssim(drawn(result, context), drawn(model, context)).mean() > 0.8


def test_decoder_is_calibrated_on_final_latents(model: OnnxModel, context: Context) -> None:
    result = OnnxInt8(part="vae_decoder", method="static", calibration_examples=5).run(model, context)  # type: ignore[arg-type]
    assert metadata(result.graphs[DECODER], METADATA)["prompts"] == 5
    assert result.graphs[UNET] == model.graphs[UNET]
    assert ssim(drawn(result, context), drawn(model, context)).mean() > 0.9


def test_accuracy_floor_is_measured_on_validation_prompts(model: OnnxModel, context: Context) -> None:
    fields = {"method": "static", "accuracy_floor": 0.9, "damage_examples": 4, "calibration_examples": 4}
    result = OnnxInt8(part="vae_decoder", **fields).run(model, context)  # type: ignore[arg-type]
    record = metadata(result.graphs[DECODER], LAYERS)
    # The float graph is compared with itself: its SSIM is 1.
    assert record["float_metric"] == pytest.approx(1.0)
    # The recorded metric is the SSIM between the images of the quantized and the float model.
    assert record["metric"] == pytest.approx(ssim(drawn(result, context), drawn(model, context)).mean(), abs=1e-6)


def test_float16_cast_changes_only_the_named_part(model: OnnxModel, context: Context) -> None:
    result = Cast(part="unet").run(model, context)  # type: ignore[arg-type]
    large = [tensor for tensor in result.graphs[UNET].graph.initializer if np.prod(tensor.dims) > 64]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.FLOAT16}
    assert result.graphs[DECODER] == model.graphs[DECODER]
    np.testing.assert_allclose(drawn(result, context), drawn(model, context), atol=0.02)


def test_float16_overflow_error_names_part_and_timestep(model: OnnxModel, context: Context) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(model.graphs[UNET])
    # A normalization follows the first convolution, so that its scale makes no difference in float32.
    for tensor in changed.graph.initializer:
        if tensor.name.startswith("unet.conv_in."):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(60_000 * array / np.abs(array).max(), tensor.name))
    large = model.with_graphs({**model.graphs, UNET: changed})
    with pytest.raises(IntegrityError, match=r"the output of unet holds NaN or infinity, at timestep 751"):
        Cast(part="unet").run(large, context)  # type: ignore[arg-type]


def test_openvino_writes_an_ir_for_each_part(model: OnnxModel, context: Context, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    result = OpenVino(precision="fp32").run(model, context)  # type: ignore[arg-type]
    folder = tmp_path / "ir"
    folder.mkdir()
    result.save(folder)
    # optimum-intel's OVDiffusionPipeline looks for these.
    for part in ("text_encoder", "unet", "vae_decoder"):
        assert (folder / part / "openvino_model.xml").is_file() and (folder / part / "openvino_model.bin").is_file()
        assert (folder / part / "config.json").is_file()
    assert (folder / "model_index.json").is_file() and not list(folder.rglob("*.onnx"))
    again = OpenVinoModel.load(folder, TASK)
    assert again == result
    pictures = open_model(again).predict(validation_batch(model, context))["pictures"]
    np.testing.assert_allclose(pictures, drawn(model, context), atol=1e-3)


PROMPT_COUNT, TOKENS, SCALING = 3, 5, 0.5
EMPTY = 9
"""The token of the empty prompt."""


class Part:
    """A fake session with simple known outputs."""

    provider = "none"
    settings: Mapping[str, Any] = {}

    def __init__(self, gives: str, **inputs: str) -> None:
        self.gives, self.inputs = gives, tuple(inputs)
        self.input_types = {name: TensorType(dtype, ()) for name, dtype in inputs.items()}
        self.output_types = {gives: TensorType("float32", ())}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        if self.gives == "last_hidden_state":
            return {"last_hidden_state": np.repeat(batch["input_ids"][:, :, np.newaxis], 2, axis=2).astype(np.float32)}
        if self.gives == "out_sample":
            return {"out_sample": 0.1 * batch["sample"]}
        return {"sample": batch["latent_sample"][:, :1]}


def session(steps: int = 50, guidance: float = 7.5, scheduler: Any = None) -> DiffusionSession:
    parts = {
        "text_encoder": Part("last_hidden_state", input_ids="int64"),
        "unet": Part("out_sample", sample="float32", timestep="int64", encoder_hidden_states="float32"),
        "vae_decoder": Part("sample", latent_sample="float32"),
    }
    text, unet, decoder = (part.predict for part in parts.values())
    latents = LatentSpace(channels=4, factor=2, multiple=2, scaling=SCALING)
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    empty = np.full((1, TOKENS), EMPTY, np.int64)
    sampler = DiffusionSampler(text, unet, decoder, scheduler, latents, Sampling(steps, guidance), empty)
    return DiffusionSession(sampler, parts, "here")


def batch() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal((PROMPT_COUNT, 4, 8, 8)).astype(np.float32)
    ids = np.arange(PROMPT_COUNT)[:, np.newaxis] + np.ones((1, TOKENS), np.int64)
    return {"input_ids": ids, "noise": noise, "seed": np.arange(PROMPT_COUNT)}


def test_denoiser_inputs_are_recorded_at_even_timesteps_with_guidance() -> None:
    watched = record_inputs(session(), "unet", batch(), np.arange(PROMPT_COUNT), seed=0)
    # DDIM's 50 of 1000 timesteps are 980, 960, ..., 0; 25 of them from the first to the last.
    expected = [980 - 20 * round(sample * 49 / 24) for sample in range(25)]
    assert list(watched.timesteps) == expected
    assert (expected[0], expected[-1]) == (980, 0)
    assert len(watched.feeds) == TIMESTEPS
    for feed in watched.feeds:
        assert feed["sample"].shape == (2 * PROMPT_COUNT, 4, 8, 8)
        np.testing.assert_array_equal(feed["sample"][:PROMPT_COUNT], feed["sample"][PROMPT_COUNT:])
        # The empty prompt comes first, as in diffusers.
        assert feed["encoder_hidden_states"][:, 0, 0].tolist() == [EMPTY] * PROMPT_COUNT + [1, 2, 3]
        # The dtype of the graph's input.
        assert feed["timestep"].dtype == np.int64
    np.testing.assert_array_equal(watched.feeds[0]["sample"][:PROMPT_COUNT], batch()["noise"])
    assert "3 prompts at 25 timesteps with guidance 7.5" in str(watched)


def test_without_guidance_each_prompt_has_one_row() -> None:
    watched = record_inputs(session(4, 1.0), "unet", batch(), np.arange(PROMPT_COUNT), seed=0)
    assert [feed["sample"].shape[0] for feed in watched.feeds] == [PROMPT_COUNT] * 4
    assert list(watched.timesteps) == [750, 500, 250, 0]
    # Heun's scheduler calls the denoiser twice in every step except the last.
    twice = record_inputs(session(5, 1.0, HeunDiscreteScheduler()), "unet", batch(), np.arange(PROMPT_COUNT), seed=0)
    assert len(twice.feeds) == 2 * 5 - 1


def test_decoder_inputs_are_the_final_latents() -> None:
    drawing = session(10)
    latents = drawing.sampler.sample_latents(batch()["input_ids"], batch()["noise"], list(range(PROMPT_COUNT)))
    watched = record_inputs(drawing, "vae_decoder", batch(), np.arange(PROMPT_COUNT), seed=0)
    np.testing.assert_allclose(
        np.concatenate([feed["latent_sample"] for feed in watched.feeds]), latents / SCALING, rtol=1e-6
    )
    text = record_inputs(drawing, "text_encoder", batch(), np.arange(PROMPT_COUNT), seed=0)
    assert [feed["input_ids"].tolist() for feed in text.feeds] == [[[1 + row] * TOKENS] for row in range(PROMPT_COUNT)]


@pytest.mark.parametrize(
    ("part", "steps", "guidance", "count", "prompts"),
    [
        # 25 steps of two rows each.
        ("unet", 50, 7.5, 250, 5),
        ("unet", 50, 7.5, 251, 6),
        ("unet", 4, 1.0, 250, 63),
        ("unet", 50, 7.5, 1, 1),
        ("text_encoder", 50, 7.5, 250, 250),
        ("vae_decoder", 50, 7.5, 250, 32),
        ("vae_decoder", 50, 7.5, 7, 7),
    ],
)
def test_prompt_count_covers_the_requested_examples(
    part: str, steps: int, guidance: float, count: int, prompts: int
) -> None:
    assert count_prompts(session(steps, guidance).sampler, part, count) == prompts


@pytest.fixture(scope="module")
def exported(generator: GeneratorModel) -> dict[str, ExportedGraph]:
    return export_diffusion(generator, generator.processor.ids(PROMPTS), None, True)


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values
    }


def test_graph_inputs_and_outputs_follow_optimum(exported: dict[str, ExportedGraph]) -> None:
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


def test_onnx_tensors_have_torch_names(generator: GeneratorModel, exported: dict[str, ExportedGraph]) -> None:
    torch_names = set(generator.tensors())
    stored = [tensor.name for part in exported.values() for tensor in part.graph.graph.initializer]
    assert len(stored) == len(set(stored))
    assert {"unet.conv_in.weight", "vae.decoder.conv_out.weight", "text_encoder.pooler.dense.bias"} <= set(
        stored
    ) & torch_names


@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [(1, 8, 8, 12), (2, 6, 14, 12), (5, 2, 4, 3)])
def test_exported_denoiser_equals_torch_at_any_size(
    generator: GeneratorModel, exported: dict[str, ExportedGraph], batch: int, height: int, width: int, tokens: int
) -> None:
    torch.manual_seed(1)
    sample, text = torch.randn(batch, 4, height, width), torch.randn(batch, tokens, 16)
    when = torch.tensor(33.0)
    with torch.inference_mode():
        expected = generator.parts["unet"](sample, when, text)[0].numpy()
    feed = {"sample": sample.numpy(), "timestep": when.numpy(), "encoder_hidden_states": text.numpy()}
    actual = session_of(exported["unet"].graph).predict(feed)["out_sample"]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_verification_names_the_graph_that_differs(
    generator: GeneratorModel, exported: dict[str, ExportedGraph]
) -> None:
    graphs = {name: item.graph for name, item in exported.items()}
    ids = generator.processor.ids(PROMPTS)
    assert max(item.worst for item in verify_diffusion(generator, graphs, ids, 1e-3).values()) < 1e-4
    changed = onnx.ModelProto()
    changed.CopyFrom(graphs["vae_decoder"])
    weight = next(item for item in changed.graph.initializer if item.name == "vae.decoder.conv_out.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 0.1, weight.name))
    with pytest.raises(IntegrityError, match="vae_decoder differs from torch by 1"):
        verify_diffusion(generator, {**graphs, "vae_decoder": changed}, ids, 1e-3)


@pytest.mark.slow
def test_guidance_conditioned_denoiser_is_exported(tmp_path: Path) -> None:
    generator = load_pipeline(pipeline_folder(tmp_path, time_cond_proj_dim=8))
    ids = generator.processor.ids(PROMPTS)
    graphs = {name: item.graph for name, item in export_diffusion(generator, ids, None, True).items()}
    assert shapes(graphs["unet"].graph.input)["timestep_cond"] == ["batch_size", 8]
    assert max(item.worst for item in verify_diffusion(generator, graphs, ids, 1e-3).values()) < 1e-4
