"""Tests of exported diffusion models in optimum's pipelines: their images against those of this package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_environments import OPTIMUM_INTEL_DRAWS, SENTENCE_TRANSFORMERS, ForeignEnvironment
from rotation import is_todays

from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion, open_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, Sampling
from compress.plugins.diffusion.sampler import open_torch

pytestmark = pytest.mark.slow
PROMPTS = ["a picture of a bag", "the dark boot"]


@pytest.fixture(scope="module")
def model(generator: GeneratorModel) -> GeneratorModel:
    return replace(generator, sampling=Sampling(4, 3.0))


def exported(model: GeneratorModel, fusions: bool) -> dict[str, onnx.ModelProto]:
    parts = export_diffusion(model, model.processor.ids(PROMPTS), None, fusions)
    return {name: part.graph for name, part in parts.items()}


def drawn_by_optimum(
    environment: ForeignEnvironment, runtime: str, folder: Path, noise: np.ndarray
) -> tuple[str, np.ndarray]:
    """Return the class name of the pipeline that optimum opens, and its images."""
    given, out = folder.with_name("noise.npy"), folder.with_name("out.npy")
    np.save(given, noise)
    script = Path(__file__).parent / "optimum_pictures.py"
    printed = environment.run(script, runtime, str(folder), json.dumps(PROMPTS), str(given), "4", "3.0", str(out))
    return printed.splitlines()[-1].strip(), np.load(out)


@pytest.mark.parametrize("bits", [None, 8])
def test_optimum_onnxruntime_generates_the_same_images(model: GeneratorModel, tmp_path: Path, bits: int | None) -> None:
    graphs, ids = exported(model, True), model.processor.ids(PROMPTS)
    if bits is not None:
        graphs["unet"], _ = quantize_matrices(graphs["unet"], WeightOnlySettings(bits, 32))
    noise = np.stack([model.processor.noise(seed) for seed in (5, 6)])
    folder = tmp_path / "onnx"
    folder.mkdir()
    diffusion_folder(model, graphs).save(folder)
    expected = open_diffusion(OnnxModel.load(folder, None)).sampler.generate(ids, noise)
    pipeline, pictures = drawn_by_optimum(SENTENCE_TRANSFORMERS, "onnxruntime", folder, noise)
    assert pipeline == "ORTStableDiffusionPipeline"
    np.testing.assert_allclose(pictures * 255, expected * 255, atol=1)


@pytest.mark.skipif(not is_todays("optimum-intel"), reason="optimum-intel is begun every fourth day")
def test_optimum_intel_generates_the_same_images(model: GeneratorModel, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from compress.formats.openvino.conversion import to_openvino
    from compress.formats.openvino.model import OpenVinoModel

    graphs, folder = diffusion_folder(model, exported(model, False)), tmp_path / "openvino"
    files = {
        f"{name.partition('/')[0]}/{file}": content
        for name, graph in graphs.graphs.items()
        for file, content in to_openvino(graph, {}, "fp32").own.items()
    }
    folder.mkdir()
    OpenVinoModel(files, graphs.companions).save(folder)
    noise = np.stack([model.processor.noise(seed) for seed in (5, 6)])
    pipeline, pictures = drawn_by_optimum(OPTIMUM_INTEL_DRAWS, "openvino", folder, noise)
    assert pipeline == "OVStableDiffusionPipeline"
    expected = open_torch(model, {}).sampler.generate(model.processor.ids(PROMPTS), noise)
    np.testing.assert_allclose(pictures * 255, expected * 255, atol=1)
