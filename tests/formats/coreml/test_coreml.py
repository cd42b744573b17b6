"""Tests of Core ML packages: coremltools opens them and they hold the model's weights (nothing runs on macOS here)."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_images
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from compress.formats.coreml.conversion import check_stored_weights, stored_values, to_coreml
from compress.formats.coreml.model import PACKAGE, CoreMlModel, MilProgram, package_files, read_coreml
from compress.formats.coreml.runtime import CoreMlSession
from compress.formats.model_file import format_of, model_file
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.models.model import TorchModel
from compress.utils.environment import has_package
from compress.utils.errors import InputError, IntegrityError, ModelError, StageError

# The import takes seconds in each process that collects tests.
if not has_package("coremltools"):
    pytest.skip("no coremltools here", allow_module_level=True)
TARGET = TARGETS["coreml"]
LENGTH = 24
NAMES = ("input_ids", "attention_mask")
WORDS = "p_module_bert_embeddings_word_embeddings_weight"
QUERY = "p_module_bert_encoder_layer_0_attention_self_query_weight"


def tiny_encoder() -> TorchModel:
    return tiny.encoder(num_hidden_layers=1)


def converted(precision: str) -> CoreMlModel:
    model = tiny_encoder()
    examples = tiny.context(max_length=LENGTH).encode("train", model)
    return to_coreml(model, examples, precision, 4, LENGTH, 1e-3)[0]  # type: ignore[arg-type]


def program_of(model: CoreMlModel) -> MilProgram:
    return read_coreml(model.specification, model.weights, Path(PACKAGE))


@pytest.fixture(scope="module")
def plain() -> CoreMlModel:
    """Return a tiny encoder as a Core ML package in fp32 (the conversion takes seconds)."""
    return converted("fp32")


@pytest.fixture(scope="module")
def small() -> CoreMlModel:
    """Return the same encoder with 8-bit weights and a 4-bit embedding table."""
    return converted("int8")


@pytest.fixture(scope="module")
def resnet() -> tuple[TorchModel, CoreMlModel]:
    """Return a tiny ResNet and its Core ML package in float16."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, **tiny_images.names())
    torch.manual_seed(0)
    model = TorchModel(ResNetForImageClassification(config).eval(), tiny_images.processor())
    examples = tiny_images.context().encode("train", model)
    return model, to_coreml(model, examples, "fp16", 8, LENGTH, 1e-3)[0]


def test_coremltools_reads_inputs_lengths_and_output(plain: CoreMlModel, tmp_path: Path) -> None:
    plain.save(tmp_path)
    assert format_of(tmp_path) == "coreml" and model_file(tmp_path) == tmp_path / PACKAGE
    with suppress_output("prints"):
        import coremltools

        opened = coremltools.models.MLModel(str(tmp_path / PACKAGE), skip_model_load=True)
        specification = opened.get_spec()
        stored = coremltools.optimize.coreml.get_weights_metadata(opened, weight_threshold=0)
    assert specification.specificationVersion == 9  # iOS 18
    assert [feature.name for feature in specification.description.output] == ["logits"]
    lengths = {
        feature.name: [(axis.lowerBound, axis.upperBound) for axis in feature.type.multiArrayType.shapeRange.sizeRanges]
        for feature in specification.description.input
    }
    assert lengths == {name: [(1, 1), (2, LENGTH)] for name in NAMES}
    expected = tiny_encoder().module.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(stored[WORDS].val, expected)


def test_fp32_weights_are_exact_and_int8_within_half_a_step(plain: CoreMlModel, small: CoreMlModel) -> None:
    weights = {name.replace(".", "_").lower(): value for name, value in tiny_encoder().tensors().items()}
    for package, suffix in ((plain, ""), (small, "_to_fp16_quantized")):
        program = program_of(package)
        stored = {constant.name: constant for constant in program.constants}
        for name in (WORDS, QUERY):
            expected = weights[name.removeprefix("p_module_")].numpy()
            values, _ = stored_values(program, stored[name + suffix], package.weights)
            groups = np.abs(expected).max(axis=-1, keepdims=True)  # a row of 32 is one group
            step = groups / (7 if name == WORDS else 127)
            bound = 1e-7 if package is plain else 0.51 * step + 1e-3 * groups
            assert np.all(np.abs(values - expected) < bound), name


def test_embedding_table_has_4_bits_and_other_weights_8(plain: CoreMlModel, small: CoreMlModel, tmp_path: Path) -> None:
    places = tmp_path / "plain", tmp_path / "small"
    for folder, package in zip(places, (plain, small), strict=True):
        folder.mkdir()
        package.save(folder)
    float_budget, budget = (budget_of(folder) for folder in places)
    assert budget.format == "coreml" and budget.parameters <= float_budget.parameters
    assert budget.total_bytes == budget.tensor_bytes + sum(budget.overhead.values())
    words = tiny_encoder().module.get_input_embeddings().weight
    (table,) = [tensor for tensor in budget.tensors if tensor.dtype == "int4"]
    assert (table.parameters, table.bytes) == (words.numel(), words.numel() // 2)
    dense = [tensor.dtype for tensor in budget.tensors if tensor.name.endswith("_dense_weight_to_fp16_quantized")]
    assert dense == ["int8"] * 4


def test_convolutions_keep_image_shape_and_weights(resnet: tuple[TorchModel, CoreMlModel]) -> None:
    model, package = resnet
    program = program_of(package)
    side = tiny_images.SIDE
    assert program.inputs == {"pixel_values": ((1, 1), (3, 3), (side, side), (side, side))}
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.module.modules())
    assert Counter(program.operators)["conv"] == convolutions
    # Convolutions are folded with the normalisation after them, so only the classifier's weights are unchanged.
    assert check_stored_weights(package, model).startswith("1 of")


def test_the_same_weights_give_the_same_bytes(small: CoreMlModel) -> None:
    again = converted("int8")
    assert again.specification == small.specification and again == small


def test_weights_of_another_model_and_changed_bytes_are_detected(plain: CoreMlModel, small: CoreMlModel) -> None:
    assert "11 of 11 matrices" in check_stored_weights(small, tiny_encoder())
    with pytest.raises(IntegrityError, match="differs from the model's"):
        check_stored_weights(small, tiny.encoder(num_hidden_layers=1, seed=7))
    (query,) = [constant for constant in program_of(plain).constants if constant.name == QUERY]
    damaged = bytearray(plain.weights)
    damaged[query.start + 3] ^= 0x40
    package = CoreMlModel(package_files(plain.specification, bytes(damaged)), plain.companions)
    with pytest.raises(IntegrityError, match=QUERY):
        check_stored_weights(package, tiny_encoder())


def test_trace_with_different_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.formats.coreml.conversion._MASKED", 0.0)
    with pytest.raises(IntegrityError, match="As traced for Core ML the logits differ"):
        converted("fp32")


def test_incomplete_package_is_refused(plain: CoreMlModel, tmp_path: Path) -> None:
    plain.save(tmp_path)
    data = tmp_path / PACKAGE / "Data" / "com.apple.CoreML"
    weights = data / "weights" / "weight.bin"
    weights.write_bytes(plain.weights[:-2000])
    with pytest.raises(ModelError, match="is not whole in the"):
        budget_of(tmp_path)
    (data / "model.mlmodel").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="cannot be read"):
        budget_of(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"lacks weight\.bin"):
        CoreMlModel.load(tmp_path, "text-classification")
    with pytest.raises(ModelError, match=r"holds 0 \.mlpackage"):
        CoreMlModel.load(data, "text-classification")


def test_coreml_target_is_unavailable_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(StageError, match="Core ML runs on macOS only"):
        get_runtime("coreml").open(tmp_path, TARGET, threads=1)


def test_session_passes_declared_inputs_row_by_row(plain: CoreMlModel, tmp_path: Path) -> None:
    # Core ML is not available here; the test checks the inputs passed to it: types, rows and names.
    plain.save(tmp_path)
    with suppress_output("prints"):
        import coremltools

        opened = coremltools.models.MLModel(str(tmp_path / PACKAGE), skip_model_load=True)

    class Asked:
        calls: list[dict[str, Any]] = []

        def get_spec(self) -> Any:
            return copy.deepcopy(opened.get_spec())

        def predict(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
            self.calls.append(row)
            return {"logits": row["input_ids"].sum(axis=1, keepdims=True)}

    session = CoreMlSession(Asked(), "here")
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    prediction = session.predict(dict(zip(NAMES, (ids, np.ones_like(ids)), strict=True)))
    assert prediction["logits"].tolist() == [[3.0], [12.0]] and prediction["logits"].dtype == np.float32
    assert [(call["input_ids"].shape, call["input_ids"].dtype) for call in Asked.calls] == [((1, 3), np.int32)] * 2
    assert session.input_types["input_ids"] == ("int32", (1, None))
    with pytest.raises(InputError, match="lacks the model's input attention_mask"):
        session.predict({"input_ids": ids})
