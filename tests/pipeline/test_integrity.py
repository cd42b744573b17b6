"""Tests of the integrity checks of stage outputs: each broken output is rejected with the stage's name and a hint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from exports import exported
from onnx import numpy_helper
from quantized import quantize_tiny_llama, save_tiny_llama
from safetensors.torch import load_file, save_file

from compress.formats.integrity import InspectedModel, ModelInspector
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.model import TorchModel
from compress.models.stored_tensor import stored
from compress.pipeline.integrity import PROBE_ROWS, IntegrityCheck, PredictionProbe, inspector_of, measure_size
from compress.stages.base import OutputSpec
from compress.tasks.registry import TASKS
from compress.utils.errors import IntegrityError

AnyModel = TorchModel | OnnxModel


def torch_model(seed: int = 0) -> TorchModel:
    return tiny.encoder(seed=seed)


def onnx_model() -> OnnxModel:
    exported_model = exported()
    return OnnxModel(exported_model.graph(), FLOAT_GRAPH, exported_model.model.companions())


def probe(kind: type[AnyModel]) -> PredictionProbe:
    rows = tiny.table(PROBE_ROWS)
    context = tiny.context()
    return PredictionProbe(
        load=lambda folder: kind.load(folder, TASKS[tiny.TASK]),
        encode=lambda processor: context.task.encode(rows, processor, None, context.max_length),
    )


def check(
    before: AnyModel,
    after: AnyModel,
    folder: Path,
    promise: OutputSpec | None = None,
    kind: type[AnyModel] | None = None,
) -> IntegrityCheck:
    """Save both models below ``folder`` and check ``after`` as the output of a stage called `squeeze`."""
    for name, model in (("before", before), ("after", after)):
        (folder / name).mkdir()
        model.save(folder / name)
    integrity = IntegrityCheck("squeeze", promise or OutputSpec())
    weight, digests = measure_size(folder / "before"), inspector_of(before).digests()
    integrity.check(after, digests, weight, folder / "after", probe(kind or type(after)))
    return integrity


def error_of_check(*arguments: Any, **options: Any) -> str:
    with pytest.raises(IntegrityError) as caught:
        check(*arguments, **options)
    assert caught.value.what.startswith("Stage 'squeeze': ") and caught.value.hint
    assert caught.value.exit_code == 3
    return caught.value.what


def test_valid_output_passes_and_reports_findings(tmp_path: Path):
    integrity = check(torch_model(0), torch_model(1), tmp_path, OutputSpec(max_size_ratio=1.01))
    assert [name for name, _ in integrity.findings] == [
        "weights finite", "tensors changed", "size", "predictions", "saved and loaded",
    ]  # fmt: skip
    findings = dict(integrity.findings)
    random = [name for name, _ in torch_model().module.named_parameters() if "LayerNorm" not in name]
    assert findings["tensors changed"] == str(len(random))
    assert findings["size"].endswith("100.0% of its input") and findings["saved and loaded"] == "logits differ by 0e+00"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_rejected(bad: float, tmp_path: Path):
    model = torch_model(1)
    with torch.no_grad():
        model.module.bert.encoder.layer[1].output.dense.weight[3, 4] = bad
    what = error_of_check(torch_model(0), model, tmp_path)
    assert "'bert.encoder.layer.1.output.dense.weight' holds NaN or infinite values" in what


def test_unchanged_weights_are_rejected(tmp_path: Path):
    assert "no weight changed" in error_of_check(torch_model(0), torch_model(0), tmp_path)


def test_unchanged_weights_pass_for_stage_that_changes_none(tmp_path: Path):
    integrity = check(torch_model(0), torch_model(0), tmp_path, OutputSpec(changes_weights=False))
    assert "tensors changed" not in dict(integrity.findings)


@pytest.mark.parametrize("change", ["one value", "a row less", "a tensor less"])
def test_every_kind_of_tensor_change_is_counted(change: str):
    model, digests_before = torch_model(0), inspector_of(torch_model(0)).digests()
    if change == "one value":
        with torch.no_grad():
            model.module.classifier.bias[1] += 1e-6
    elif change == "a row less":
        model.module.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(
            model.module.bert.embeddings.word_embeddings.weight[:-1].detach()
        )
    else:
        del model.module.bert.encoder.layer[1]
    integrity = IntegrityCheck("squeeze", OutputSpec())
    integrity._changed(digests_before, inspector_of(model).digests())
    assert dict(integrity.findings)["tensors changed"] == ("16" if change == "a tensor less" else "1")


def test_output_larger_than_guaranteed_is_rejected(tmp_path: Path):
    what = error_of_check(torch_model(0), torch_model(1), tmp_path, OutputSpec(max_size_ratio=0.5))
    assert "100% of its input's; the stage guarantees at most 50%" in what


def test_size_guarantee_covers_tensors_and_not_other_files(tmp_path: Path):
    smaller = tiny.encoder(seed=1, num_hidden_layers=1)
    for name, model in (("before", torch_model(0)), ("after", smaller)):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name)
    for name in ("before", "after"):
        (tmp_path / name / "tokenizer.json").write_text("x" * 1_000_000)
    size_before, after = measure_size(tmp_path / "before"), measure_size(tmp_path / "after")
    assert after.files > 0.95 * size_before.files > 1_000_000
    held = sum(parameter.numel() for parameter in smaller.module.parameters())
    assert after.tensors == 4 * held
    integrity = IntegrityCheck("squeeze", OutputSpec(max_size_ratio=0.8))
    integrity._size(size_before, after)
    assert dict(integrity.findings)["size"].startswith(f"{after.files:,} bytes, {after.files / size_before.files:.1%}")
    with pytest.raises(IntegrityError, match="the stage guarantees at most 30%"):
        IntegrityCheck("squeeze", OutputSpec(max_size_ratio=0.3))._size(size_before, after)
    over = int(after.tensors - 0.3 * size_before.tensors)
    IntegrityCheck("squeeze", OutputSpec(max_size_ratio=0.3, overhead_bytes=over + 1))._size(size_before, after)
    with pytest.raises(IntegrityError, match="the stage guarantees at most 30%"):
        IntegrityCheck("squeeze", OutputSpec(max_size_ratio=0.3, overhead_bytes=over - 1))._size(size_before, after)


def test_equal_predictions_for_all_examples_are_rejected(tmp_path: Path):
    model = torch_model(1)
    torch.nn.init.zeros_(model.module.classifier.weight)
    assert "predictions are all the same" in error_of_check(torch_model(0), model, tmp_path)


def test_non_finite_predictions_of_finite_weights_are_rejected(tmp_path: Path):
    model = torch_model(1)
    torch.nn.init.constant_(model.module.classifier.weight, 3e38)
    torch.nn.init.constant_(model.module.bert.pooler.dense.bias, 20.0)
    assert "predictions hold NaN or infinity" in error_of_check(torch_model(0), model, tmp_path)


class SavesOtherWeights(TorchModel):
    """A model whose saved weights differ from those in memory."""

    def save(self, directory: Path) -> None:
        other = copy.deepcopy(self.module)
        with torch.no_grad():
            other.classifier.bias += 1e-3
        TorchModel(other, self.processor).save(directory)


def test_reloaded_model_with_different_predictions_is_rejected(tmp_path: Path):
    model = torch_model(1)
    broken = SavesOtherWeights(model.module, model.processor)
    what = error_of_check(torch_model(0), broken, tmp_path, kind=TorchModel)
    assert "after saving and loading its predictions differ" in what and "1.0e-03" in what


class SavesOtherTokenIds(TorchModel):
    """A model whose tokenizer is saved with different token ids."""

    def save(self, directory: Path) -> None:
        self.module.save_pretrained(directory)
        vocabulary = self.processor.get_vocab()
        words = [token for token in vocabulary if token not in tiny.SPECIAL]
        turned = dict(zip(words, [vocabulary[token] for token in reversed(words)], strict=True))
        type(self.processor)(vocab={**vocabulary, **turned}).save_pretrained(directory)


def test_reloaded_model_with_different_tokenizer_is_rejected(tmp_path: Path):
    model = torch_model(1)
    broken = SavesOtherTokenIds(model.module, model.processor)
    what = error_of_check(torch_model(0), broken, tmp_path, kind=TorchModel)
    assert "after saving and loading its predictions differ" in what


@pytest.mark.parametrize("change", [lambda array: array.reshape(1, *array.shape), lambda array: array.view(np.int32)])
def test_digests_differ_for_equal_bytes_of_other_shape_or_type(change: Callable[[np.ndarray], np.ndarray]):
    first, other = onnx_model(), onnx_model()
    tensor = next(entry for entry in other.graph.graph.initializer if entry.data_type == onnx.TensorProto.FLOAT)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    digests = inspector_of(first).digests(), inspector_of(other).digests()
    assert [name for name in digests[0] if digests[0][name] != digests[1][name]] == [tensor.name]


def decoder_probe() -> PredictionProbe:
    task = TASKS["text-generation"]
    rows = tiny.table(PROBE_ROWS).select(["text"])
    return PredictionProbe(
        load=lambda folder: QuantizedCheckpoint.load(folder, "text-generation"),
        encode=lambda processor: task.encode(rows, processor, None, 24),
    )


def decoder_check(
    before: Checkpoint, after: Checkpoint, folder: Path, promise: OutputSpec | None = None
) -> IntegrityCheck:
    folder.mkdir()
    after.save(folder)
    integrity = IntegrityCheck("squeeze", promise or OutputSpec())
    integrity.check(after, inspector_of(before).digests(), measure_size(before.folder), folder, decoder_probe())
    return integrity


def change(checkpoint: Checkpoint, name: str, changed: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoint:
    """Replace one tensor of the checkpoint's file and return the checkpoint loaded again."""
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = changed(tensors[name])
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return type(checkpoint)(checkpoint.folder)


def test_quantized_checkpoint_passes_integrity_checks(tmp_path: Path):
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")
    findings = dict(decoder_check(source, quantized, tmp_path / "saved", OutputSpec(max_size_ratio=0.8)).findings)
    assert findings["saved and loaded"] == "logits differ by 0e+00"
    linears = 14
    # Each linear layer: 4 new tensors and 1 removed; the embedding table: 4 parts; 6 float32 tensors cast to float16.
    assert findings["tensors changed"] == str(linears * 4 + linears + 4 + 6)


def test_quantization_scale_that_is_not_finite_is_rejected(tmp_path: Path):
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")

    def spoil(scales: torch.Tensor) -> torch.Tensor:
        scales[0, 3] = torch.inf
        return scales

    broken = change(quantized, "model.layers.1.mlp.up_proj.scales", spoil)
    with pytest.raises(IntegrityError, match=r"'model\.layers\.1\.mlp\.up_proj\.scales' holds NaN or infinite"):
        decoder_check(source, broken, tmp_path / "saved")


def test_large_tensor_is_checked_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("compress.formats.integrity.CHUNK_ELEMENTS", 1000)
    source = save_tiny_llama(tmp_path / "source")
    pieces = [array for name, array in inspector_of(source).float_arrays() if name == "model.embed_tokens.weight"]
    assert [len(piece) for piece in pieces] == [1000] * 10 + [240]
    np.testing.assert_array_equal(np.concatenate(pieces), source.stored("model.embed_tokens.weight").flatten().numpy())


@pytest.mark.parametrize(
    ("role", "values", "is_checked"),
    [
        ("constant", [-np.inf, 0.0], False),  # the mask of a router that prefers groups of experts
        ("constant", -np.inf, False),
        ("constant", [np.nan, -np.inf], True),
        ("constant", [1.0, 2.0], True),
        ("weight", [-np.inf, 0.0], True),
    ],
)
def test_only_constants_may_be_infinite(role: str, values: Any, is_checked: bool) -> None:
    data = np.asarray(values, np.float32)

    def stored_tensors(_: object) -> Any:
        raw = data.reshape(-1).view(np.uint8)
        yield stored("value", "float32", data.shape, Path(), (0, raw.nbytes), role=role), raw

    inspected = InspectedModel(None, ModelInspector(stored_tensors, lambda *_: data))
    assert bool([*inspected.float_arrays()]) == is_checked
