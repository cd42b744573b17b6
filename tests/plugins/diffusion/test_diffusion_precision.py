"""Fewer bits for the parts of a model that draws pictures: integers, halves, and OpenVINO's files of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import numpy_helper
from tiny_pipelines import WORDS, pipeline_folder

from compress.data.dataset import Dataset
from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.model import OpenVinoModel
from compress.formats.openvino.stage import OpenVino
from compress.formats.runtime import open_model
from compress.plugins.diffusion.image_similarity import ssim
from compress.plugins.diffusion.onnx_export import diffusion_folder, export_diffusion, open_diffusion
from compress.plugins.diffusion.pipeline_model import load_pipeline
from compress.plugins.diffusion.sampler import PICTURES
from compress.stages.base import Context
from compress.stages.cast import Cast
from compress.stages.onnx_int8.quantizer import LAYERS, METADATA
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.tasks.registry import get_task
from compress.utils.errors import IntegrityError
from compress.utils.progress import SilentProgress

UNET, DECODER = "unet/model.onnx", "vae_decoder/model.onnx"
TASK = get_task("text-to-image")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    folder = pipeline_folder(tmp_path_factory.mktemp("pipeline"))
    (folder / "sampling_config.json").write_text('{"num_inference_steps": 4, "guidance_scale": 2.0}')
    torch_model = load_pipeline(folder)
    ids = torch_model.processor.ids(["a bag", "the small dark boot of a photo"])
    exported = export_diffusion(torch_model, ids, None, fusions=False)
    return diffusion_folder(torch_model, {name: part.graph for name, part in exported.items()})


@pytest.fixture
def context(tmp_path: Path) -> Context:
    prompts = [f"a {WORDS[9 + row % 4]} {WORDS[3 + row % 2]}" for row in range(12)]
    rows = pa.table({"text": prompts, "label": [WORDS[3 + row % 2] for row in range(12)]})
    data = Dataset(TASK.columns, {"train": rows, "validation": rows.slice(0, 2)}, ())

    def none(label: str) -> None:
        raise AssertionError(label)

    return Context(TASK, data, 24, 0, SilentProgress(), none, Path, tmp_path / "scratch")  # type: ignore[arg-type]


def drawn(model: OnnxModel, context: Context) -> np.ndarray:
    session = open_diffusion(model)
    examples = TASK.encode(context.data.split("validation"), load_processor(model), None, 24)
    return session.predict(examples.batch([0, 1]))[PICTURES]


def load_processor(model: OnnxModel) -> object:
    from compress.models.processor import processor_of

    return processor_of(model)


def metadata(graph: onnx.ModelProto, key: str) -> dict[str, object]:
    (value,) = (json.loads(entry.value) for entry in graph.metadata_props if entry.key == key)
    return value


def test_a_denoiser_in_integers_is_calibrated_on_all_of_the_way(model: OnnxModel, context: Context) -> None:
    stage = OnnxInt8(part="unet", method="static", split_concatenations=True, calibration_examples=24)  # type: ignore[arg-type]
    result = stage.run(model, context)
    # 24 examples are three prompts' four steps, each with guidance; Stable Diffusion's steps are offset by one.
    record = metadata(result.graphs[UNET], METADATA)
    assert (record["prompts"], record["timesteps"], record["guidance"]) == (3, [751.0, 501.0, 251.0, 1.0], 2.0)
    others = [name for name in model.graphs if name != UNET]
    assert [result.graphs[name] for name in others] == [model.graphs[name] for name in others]
    # Both resnets on the way up have a shortcut that reads a concatenation.
    names = [node.name for node in result.graphs[UNET].graph.node if node.op_type == "Conv"]
    shortcuts = {name.partition("/part_")[0] for name in names if "/part_" in name}
    assert len(shortcuts) == 4
    assert sum("/part_" in name for name in names) == 8
    integers = [
        initializer
        for initializer in result.graphs[UNET].graph.initializer
        if initializer.data_type == onnx.TensorProto.INT8
    ]
    assert len(integers) >= len(names)
    assert "4 convolutions split by the parts of what they read" in " ".join(context.notes)
    assert ssim(drawn(result, context), drawn(model, context)).mean() > 0.8


def test_a_decoder_is_calibrated_on_what_sampling_ends_in(model: OnnxModel, context: Context) -> None:
    result = OnnxInt8(part="vae_decoder", method="static", calibration_examples=5).run(model, context)  # type: ignore[arg-type]
    assert metadata(result.graphs[DECODER], METADATA)["prompts"] == 5
    assert result.graphs[UNET] == model.graphs[UNET]
    assert ssim(drawn(result, context), drawn(model, context)).mean() > 0.9


def test_a_floor_is_held_on_pictures_of_validation_prompts(model: OnnxModel, context: Context) -> None:
    fields = {"method": "static", "accuracy_floor": 0.9, "damage_examples": 4, "calibration_examples": 4}
    result = OnnxInt8(part="vae_decoder", **fields).run(model, context)  # type: ignore[arg-type]
    record = metadata(result.graphs[DECODER], LAYERS)
    # The float graph's pictures are its own: a similarity of 1.
    assert record["float_metric"] == pytest.approx(1.0)
    # Every decoder of layers is 8-bit or float as the record says, and what is told is what these pictures show.
    assert record["metric"] == pytest.approx(ssim(drawn(result, context), drawn(model, context)).mean(), abs=1e-6)


def test_halves_are_proven_by_part(model: OnnxModel, context: Context) -> None:
    result = Cast(part="unet").run(model, context)  # type: ignore[arg-type]
    stored = {
        initializer.data_type for initializer in result.graphs[UNET].graph.initializer if np.prod(initializer.dims) > 64
    }
    assert stored == {onnx.TensorProto.FLOAT16}
    assert result.graphs[DECODER] == model.graphs[DECODER]
    np.testing.assert_allclose(drawn(result, context), drawn(model, context), atol=0.02)


def test_what_float16_cannot_hold_is_named_by_part_and_timestep(model: OnnxModel, context: Context) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(model.graphs[UNET])
    # What comes of the first convolution is normalized behind it, so that float32 doesn't mind.
    for tensor in changed.graph.initializer:
        if tensor.name.startswith("unet.conv_in."):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(60_000 * array / np.abs(array).max(), tensor.name))
    large = model.with_graphs({**model.graphs, UNET: changed})
    with pytest.raises(IntegrityError, match=r"the output of unet holds NaN or infinity, at timestep 751"):
        Cast(part="unet").run(large, context)  # type: ignore[arg-type]


def test_each_part_is_an_ir_in_its_folder(model: OnnxModel, context: Context, tmp_path: Path) -> None:
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
    examples = TASK.encode(context.data.split("validation"), load_processor(model), None, 24)
    np.testing.assert_allclose(
        open_model(again).predict(examples.batch([0, 1]))[PICTURES], drawn(model, context), atol=1e-3
    )
