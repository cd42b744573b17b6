"""What `export` and `quantize_weights` write of a model that draws pictures opens unmodified in optimum's pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_environments import SENTENCE_TRANSFORMERS
from tiny_pipelines import pipeline_folder

from compress.checkpoints.diffusion_pipeline import GeneratorModel, load_pipeline
from compress.checkpoints.sampling import Sampling
from compress.formats.onnx.drawing import drawing_folder, export_drawing, open_drawing
from compress.formats.onnx.few_bits import FewBits, quantize_matrices
from compress.formats.onnx.model import OnnxModel

pytestmark = pytest.mark.slow
PROMPTS = ["a picture of a bag", "the dark boot"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GeneratorModel, dict[str, onnx.ModelProto]]:
    made = load_pipeline(pipeline_folder(tmp_path_factory.mktemp("torch")))
    model = replace(made, sampling=Sampling(4, 3.0))
    found = export_drawing(model, model.processor.ids(PROMPTS), None, True)
    return model, {name: one.graph for name, one in found.items()}


@pytest.mark.parametrize("bits", [None, 8])
def test_optimum_draws_the_same_pictures(
    exported: tuple[GeneratorModel, dict[str, onnx.ModelProto]], tmp_path: Path, bits: int | None
) -> None:
    model, graphs = exported[0], dict(exported[1])
    ids = model.processor.ids(PROMPTS)
    if bits is not None:
        graphs["unet"], _ = quantize_matrices(graphs["unet"], FewBits(bits, 32))
    noise = np.stack([model.processor.noise(seed) for seed in (5, 6)])
    folder = tmp_path / "onnx"
    folder.mkdir()
    drawing_folder(model, graphs).save(folder)
    expected = open_drawing(OnnxModel.load(folder, None)).sampler.draw(ids, noise)
    np.save(tmp_path / "noise.npy", noise)
    script = Path(__file__).parent / "optimum_pictures.py"
    given = (str(folder), json.dumps(PROMPTS), str(tmp_path / "noise.npy"), "4", "3.0", str(tmp_path / "out.npy"))
    assert SENTENCE_TRANSFORMERS.run(script, *given).strip() == "ORTStableDiffusionPipeline"
    np.testing.assert_allclose(np.load(tmp_path / "out.npy") * 255, expected * 255, atol=1)
