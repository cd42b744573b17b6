"""Quantization-aware training, whole: what is trained is what ships, in a ViT and in a net of convolutions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_images
import torch
from pydantic import ValidationError
from quantized import quantize_tiny_llama, save_tiny_llama
from torch import nn

from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.stages.qat.stage import Qat
from compress.tasks.image_classification import TASK
from compress.tasks.registry import get_task
from compress.utils.errors import ModelError, StageError

QUICK: dict[str, Any] = {"epochs": 6, "batch_size": 16, "labels_weight": 1.0, "calibration_examples": 32}


def taught(model: TorchModel, **fields: Any) -> tuple[OnnxModel, Context]:
    context = tiny_images.context(tiny_images.dataset(train=96))
    return Qat.model_validate({**QUICK, **fields}).run(model, context), context


def kernels(shipped: OnnxModel, folder: Path) -> Counter[str]:
    onnx.save(shipped.graph, folder / "model.onnx")
    return Counter(node.op_type for node in ir.load(write_optimized(folder / "model.onnx", folder, 1)).graph)


def accuracy(shipped: OnnxModel, model: TorchModel, context: Context) -> float:
    session = onnxruntime.InferenceSession(shipped.graph.SerializeToString(), providers=["CPUExecutionProvider"])
    examples = TASK.encode(context.data.split("test"), model.processor, tiny_images.LABELS, 128)
    (logits,) = session.run(["logits"], {"pixel_values": examples.batch(range(32))["pixel_values"]})
    return float((logits.argmax(axis=-1) == examples.labels).mean())


@pytest.mark.parametrize(("bits", "format"), [(4, "qoperator"), (8, "qdq")])
def test_a_vit_learns_and_ships_what_it_learned(bits: int, format: str, tmp_path: Path) -> None:
    model = tiny_images.vit(hidden_size=48, intermediate_size=64)
    shipped, context = taught(model, bits=bits, format=format, learning_rate=2e-3)
    # By chance 26 of 32 are right in 3 of 10,000 tries. Processors round its training otherwise; on one it came to 28.
    assert accuracy(shipped, model, context) > 0.8
    domains = {node.domain for node in shipped.graph.graph.node}
    assert ("com.microsoft" in domains) is (format == "qoperator"), "QDQ is for any runtime"
    found = kernels(shipped, tmp_path)
    # Two blocks of query, key and value (with their attention, in the fused graph), output, up and down.
    assert found["QAttention"] == (2 if format == "qoperator" else 0)
    assert found["MatMulIntegerToFloat"] == (6 if format == "qoperator" else 12)
    assert found["QLinearConv"] == 1, "the patches"
    stored = {tensor.data_type for tensor in shipped.graph.graph.initializer}
    assert (onnx.TensorProto.INT4 in stored) is (bits == 4)


@pytest.mark.full_range(own_kernels=True)
def test_a_net_of_convolutions_learns_and_ships_what_it_learned(tmp_path: Path) -> None:
    model = tiny_images.mobile_net()
    shipped, context = taught(model, bits=8, learning_rate=3e-3)
    assert accuracy(shipped, model, context) > 0.9
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.module.modules())
    found = kernels(shipped, tmp_path)
    convolutions = sum(isinstance(part, nn.Conv2d) for part in model.module.modules())
    assert found["QLinearConv"] == convolutions and not found["Conv"] and not found["FusedConv"]
    assert any("batch normalisations folded" in remark for remark in context.notes)


def test_a_model_with_nothing_to_quantize_is_refused_before_it_is_trained() -> None:
    model = tiny_images.vit(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    model.module.vit.embeddings.patch_embeddings.projection.padding_mode = "reflect"
    with pytest.raises(StageError, match="no layer to quantize"):
        taught(model)


def test_four_bits_in_an_old_operator_set_are_refused_with_the_recipe() -> None:
    with pytest.raises(ValidationError, match="opset 21 or newer"):
        Qat(bits=4, opset=20)
    assert Qat(bits=8, opset=20).opset == 20


@pytest.mark.parametrize("task", ["text-classification", "image-classification", "feature-extraction", "fill-mask"])
def test_a_gptq_folder_is_refused_before_it_is_loaded(task: str, tmp_path: Path) -> None:
    # transformers would ask for packages that quantize, or fail inside them with a NameError.
    quantize_tiny_llama(save_tiny_llama(tmp_path / "float"), tmp_path / "gptq")
    with pytest.raises(ModelError, match=r"quantized already: .* \(quant_method: gptq\)") as refused:
        get_task(task).load(tmp_path / "gptq", ["good", "bad"], trust_remote_code=False)
    assert refused.value.where == str(tmp_path / "gptq")


def test_the_float_model_answers_the_images_that_the_integers_are_shown() -> None:
    model = tiny_images.vit(hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def keep(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if type(inputs["pixel_values"]) is torch.Tensor:  # and not what traces the graph
            seen[module.training].append(inputs["pixel_values"].clone())

    # The copy that teaches has it too.
    model.module.register_forward_pre_hook(keep, with_kwargs=True)
    taught(model, epochs=1, augment={"crop_padding": 1, "horizontal_flip": 0.5})
    assert len(seen[True]) == 6, "one epoch of 96 examples"
    assert all(any(torch.equal(mine, theirs) for theirs in seen[False]) for mine in seen[True])
