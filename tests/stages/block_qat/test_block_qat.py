"""Tests of block-wise QAT: gradients against closed forms, trained blocks against the float model's hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import Notes, context, layers_of, save_decoder
from gguf import GGUFReader
from gguf.quants import dequantize
from mergeable import ROWS, train_tokenizer
from torch import nn
from torch.nn.utils import parametrize
from written_decoders import Graph, random_ids

from compress.formats.gguf.export import write_gguf
from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.quantized_module import load_quantized_module
from compress.numerics.integer_grid import QuantizedWeight
from compress.stages.block_qat.stage import BlockQat
from compress.stages.block_qat.trainer import BlockTrainer, LearnedIntegers
from compress.stages.blockwise.blockwise_model import build_blockwise_model, last_hidden
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.gptq.stage import Gptq
from compress.utils.storage import digest_directory

SMALL: dict[str, Any] = {"bits": 2, "group_size": 32, "samples": 40, "sequence_length": 32, "precision": "fp32"}
SMALL |= {"guided": False, "embedding_bits": 16}
RATES = {"learning_rate": 0.003}
QUICK: dict[str, Any] = {**SMALL, **RATES, "epochs": 4, "batch_size": 4, "held_out": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    checkpoint = save_decoder(tmp_path_factory.mktemp("source"), vocab_size=ROWS)
    train_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint


@pytest.fixture(scope="module")
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def trained(source: Checkpoint, notes: Notes, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return BlockQat(**QUICK).run(source, context(tmp_path_factory.mktemp("trained"), progress=notes))


def grid(symmetric: bool = True) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(0, 4, (3, 8), generator=generator).to(torch.uint8)
    zeros = torch.full((3, 2), 2) if symmetric else torch.tensor([[0, 1], [2, 3], [1, 1]])
    scales = torch.tensor([[0.5, -0.25], [1.0, 2.0], [0.125, 0.5]])
    return QuantizedWeight(integers, scales, zeros.to(torch.uint8), 2, 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_a_rounded_weight_in_closed_form(symmetric: bool) -> None:
    """dL/dv = dL/dw s, as if nothing were rounded; dL/d(log s) = s times the sum of dL/dw q over each group."""
    quantized, slope = grid(symmetric), torch.arange(24.0).view(3, 8) - 11
    layer = nn.Linear(8, 3, bias=False)
    layer.weight.data = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    parametrize.register_parametrization(layer, "weight", LearnedIntegers(quantized), unsafe=True)
    steps, learned = layer.parametrizations.weight.original, layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
    # Training starts from the given integers, whatever the float weight was.
    assert torch.equal(layer.weight, quantized.dequantize())
    (layer.weight * slope).sum().backward()
    scales = quantized.scales.repeat_interleave(4, 1)
    assert torch.equal(steps.grad, slope * scales)
    whole = quantized.integers.float() - quantized.zero_points.float().repeat_interleave(4, 1)
    torch.testing.assert_close(learned.log_ratio.grad, quantized.scales * (slope * whole).view(3, 2, 4).sum(-1))


def test_weights_round_to_nearest_and_clamp_to_the_grid() -> None:
    learned = LearnedIntegers(grid(symmetric=False))
    steps = torch.tensor([[0.4, 0.6, -3.0, 9.0, 1.2, -0.8, 5.0, -1.6]]).repeat(3, 1)
    # From -zero_point to 3 - zero_point; the zero points of the first row are 0 and 1.
    assert learned.integers(steps)[0].tolist() == [0, 1, 0, 3, 1, -1, 2, -1]
    learned.hold(steps)
    torch.testing.assert_close(steps[0], torch.tensor([0.4, 0.6, -0.49, 3.49, 1.2, -0.8, 2.49, -1.49]))
    assert learned.learned(steps).integers[0].tolist() == [0, 1, 0, 3, 2, 0, 3, 0]


def test_trained_model_is_closer_to_float_than_gptq(
    source: Checkpoint, trained: QuantizedCheckpoint, notes: Notes, tmp_path: Path
) -> None:
    ids = calibration_sequences(context(tmp_path), source, 40, 32)
    expected = last_hidden(build_blockwise_model(source), ids)
    other = Gptq(**SMALL).run(source, context(tmp_path))

    def error(checkpoint: Checkpoint) -> float:
        difference = (last_hidden(build_blockwise_model(checkpoint), ids) - expected).square().mean(-1)
        return float((difference / expected.square().mean(-1)).mean())

    assert error(trained) < 0.85 * error(other)
    remarks = [line for line in notes.said if "held-out text" in line]
    assert [line.split(":")[0] for line in remarks] == ["model.layers.0", "model.layers.1"]
    assert all(layer["block_error"] < 0.5 for name, layer in layers_of(trained.folder).items() if layer.get("bits"))


def test_integers_fit_their_bits_and_norms_are_trained(source: Checkpoint, trained: QuantizedCheckpoint) -> None:
    for name in layers_of(trained.folder):
        layer = trained.quantized(name)
        if layer is not None:
            assert layer.bits == 2 and int(layer.integers.max()) == 3 and layer.symmetric
    norm = "model.layers.1.input_layernorm.weight"
    assert trained.stored(norm).dtype == torch.float16
    assert not torch.equal(trained.stored(norm), source.stored(norm).half())
    assert torch.equal(trained.stored("model.norm.weight"), source.stored("model.norm.weight").half())


def test_onnx_and_gguf_contain_the_trained_integers(trained: QuantizedCheckpoint, tmp_path: Path) -> None:
    ids = random_ids(2, 21)
    with torch.no_grad():
        expected = load_quantized_module(trained)(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(
        Graph(export_decoder(trained, GraphSettings(accuracy_level=1)).graph).run(ids)[0],
        expected,
        atol=2e-4,
        rtol=1e-4,
    )
    write_gguf(trained, tmp_path / "tiny.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    for short, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = tensors[f"blk.1.{short}.weight"]
        trained_weight = trained.weight(f"model.layers.1.{name}").numpy()
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), trained_weight)


class Stop(Exception):  # noqa: N818
    """Exception that interrupts a run, as a kill would."""


def test_interrupted_run_resumes_with_the_next_block(
    source: Checkpoint, trained: QuantizedCheckpoint, tmp_path: Path
) -> None:
    def stop(message: str) -> None:
        if message.startswith("model.layers.1:"):
            raise Stop

    with pytest.raises(Stop):
        BlockQat(**QUICK).run(source, context(tmp_path, progress=Notes(stop)))
    again = Notes()
    result = BlockQat(**QUICK).run(source, context(tmp_path, progress=again))
    assert digest_directory(result.folder) == digest_directory(trained.folder)
    assert not any(line.startswith("model.layers.0:") for line in again.said)
    assert len(list(tmp_path.rglob("states-*"))) == 2


def test_blocks_whose_training_becomes_nan_keep_gptq_weights(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, blocks = BlockTrainer._error, []

    def error(trainer: BlockTrainer, windows: torch.Tensor) -> float:
        blocks.append([not any(part.is_meta for part in block.parameters()) for block in trainer.run.decoder.blocks])
        return plain(trainer, windows) if len(blocks) in (1, 3) else float("nan")

    monkeypatch.setattr(BlockTrainer, "_error", error)
    stage_context = context(tmp_path / "stopped")
    result = BlockQat(**QUICK).run(source, stage_context)
    assert [remark.split(":")[0] for remark in stage_context.notes if "stopped, since it became nan" in remark] == [
        "model.layers.0",
        "model.layers.1",
    ]
    # One block is in memory at a time.
    assert blocks == [[True, False], [True, False], [False, True], [False, True]]
    monkeypatch.undo()
    other = Gptq(**SMALL).run(source, context(tmp_path / "gptq"))
    for name in layers_of(other.folder):
        layer, another = result.quantized(name), other.quantized(name)
        assert layer is None or (another is not None and torch.equal(layer.integers, another.integers))


def test_predicted_cost_exceeds_that_of_gptq(plan_of: Any) -> None:
    shape, plan = plan_of
    predicted, less = BlockQat(**QUICK).predict(shape, plan), Gptq(**SMALL).predict(shape, plan)
    # Two more passes forwards, and three for each epoch: 14 of 2 FLOPs a weight and token.
    added = 14 * 2 * (shape.attention + shape.feed_forward) * 40 * 32
    assert predicted.seconds.flops - less.seconds.flops == pytest.approx(added)
    assert predicted.disk_bytes == less.disk_bytes
    assert predicted.peak_memory_bytes.value >= 32 * (shape.attention + shape.feed_forward) / shape.layers


@pytest.fixture
def plan_of() -> Any:
    from compress.stages.cost_model import PlanContext, Shape

    plan = PlanContext(512, True, {}, {}, lambda name, drawn: None, lambda: 1e9)
    return Shape(1e6, 3e8, 6e8, 1e4, layers=4, hidden=512, intermediate=1024, heads=8), plan


@pytest.mark.parametrize(
    ("fields", "expected"), [({"method": "rtn"}, "from whose integers"), ({"held_out": 32}, "held_out below samples")]
)
def test_fields_that_leave_no_training_data_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        BlockQat(**fields)


@pytest.mark.parametrize(("config", "layers"), [("MixtralConfig", 4 + 4 * 3), ("Qwen2Config", 7)])
def test_experts_and_biases_are_trained_too(config: str, layers: int, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", config, sliding_window=None, num_hidden_layers=1)
    result = BlockQat(**QUICK).run(source, context(tmp_path / "scratch"))
    errors = [layer["block_error"] for layer in layers_of(result.folder).values() if layer.get("bits")]
    assert len(errors) == layers and 0 < errors[0] < 0.5
    if config == "Qwen2Config":
        name = "model.layers.0.self_attn.v_proj.bias"
        assert not torch.equal(result.stored(name), source.stored(name).half())
