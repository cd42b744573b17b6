"""Tests of ExecuTorch programs: logits of ExecuTorch's runtime are compared with those of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from stage_contract import Ran, check_contract, check_reads, run

from compress.formats.executorch.export import ROWS, Lowered, check_program_parity, to_executorch
from compress.formats.executorch.model import INTERFACE, PTE_FILE, ExecuTorchModel, calls_of, read_pte
from compress.formats.executorch.stage import ExecuTorch
from compress.formats.model_file import format_of, model_file
from compress.formats.quiet_output import suppress_output
from compress.formats.runtime import TensorType, get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.models.model import TorchModel
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples
from compress.utils.errors import InputError, IntegrityError, ModelError, StageError

pytestmark = pytest.mark.slow

pytest.importorskip("executorch")
TARGET = TARGETS["executorch"]
LENGTH = 16
NAMES = ("input_ids", "attention_mask")


def tiny_encoder() -> TorchModel:
    return tiny.encoder(num_hidden_layers=1)


def examples_of(model: TorchModel) -> Examples:
    return tiny.context(max_length=LENGTH).encode("train", model)


@pytest.fixture(scope="module")
def plain(executorch_program: Path) -> tuple[TorchModel, ExecuTorchModel, Path]:
    """Return a model, its program in fp32 and the folder of that program."""
    return tiny_encoder(), ExecuTorchModel.load(executorch_program, TASKS[tiny.TASK]), executorch_program


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Lowered]:
    """Run the stage on that model (8-bit weights, 4-bit embeddings) and return its run and the verified program."""
    proven: list[Lowered] = []

    def watched(made: Lowered, *others: Any) -> str:
        proven.append(made)
        return check_program_parity(made, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.formats.executorch.export.check_program_parity", watched)
        return run(ExecuTorch(), tmp_path_factory.mktemp("stage") / "once"), proven[0]


@pytest.fixture(scope="module")
def small(ran: tuple[Ran, Lowered]) -> tuple[TorchModel, Lowered, Path]:
    """Return the model, its quantized program and the folder of that program."""
    return tiny_encoder(), ran[1], ran[0].folder


def integers_of(content: bytes, file: Path) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield the int8 weights of each linear layer, their scales and the byte offset of the scales."""
    stored = {tensor.name: tensor for tensor in read_pte(content, file)}
    for name, tensor in stored.items():
        if tensor.dtype == "int8" and (scales := stored.get(f"{name}.scale")) is not None:
            integers = np.frombuffer(content, np.int8, tensor.bytes, tensor.start).reshape(tensor.shape)
            yield integers, np.frombuffer(content, np.float32, scales.bytes // 4, scales.start), scales.start


def batch_of(rows: int, length: int) -> dict[str, np.ndarray]:
    """Return token ids and masks [rows, length]; the second half of the last row is padding."""
    ids = np.random.default_rng(0).integers(5, 30, (rows, length))
    mask = np.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    return dict(zip(NAMES, (ids, mask), strict=True))


def torch_logits(module: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits)


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, 7), (3, 5), (ROWS, LENGTH), (2 * ROWS + 3, 11)])
def test_fp32_logits_match_torch(plain: tuple[TorchModel, ExecuTorchModel, Path], rows: int, length: int) -> None:
    model, _, folder = plain
    session = get_runtime("executorch").open(folder, TARGET, threads=1)
    batch = batch_of(rows, length)
    np.testing.assert_allclose(session.predict(batch)["logits"], torch_logits(model.module, batch), atol=1e-5)


def test_no_expand_copies_to_the_same_shape(small: tuple[TorchModel, Lowered, Path]) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    read: Any = deserialize_pte_binary(small[1].model.own[PTE_FILE])
    (plan,) = read.program.execution_plan
    kernels = [plan.operators[call.op_index].name for call in calls_of(plan) if hasattr(call, "op_index")]
    # One is for the mask, which is really expanded; copies in attention would split XNNPACK's partition.
    assert kernels.count("aten::expand_copy") <= 1 < len(list(calls_of(plan))) - len(kernels)


def test_int8_weights_are_within_half_a_step_of_float_weights(small: tuple[TorchModel, Lowered, Path]) -> None:
    model, _, folder = small
    stored = [(integers, factors) for integers, factors, _ in integers_of((folder / PTE_FILE).read_bytes(), folder)]
    products = [layer.weight.detach().numpy() for layer in model.module.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(stored) == len(products)
    for weight in products:
        distances = [
            np.abs(integers * factors[:, None] - weight).max() / factors.max()
            for integers, factors in stored
            if integers.shape == weight.shape
        ]
        assert min(distances) <= 0.51, "no stored product is this one within half a step"


def test_embeddings_have_4_bits_and_sizes_add_up(
    plain: tuple[TorchModel, ExecuTorchModel, Path], small: tuple[TorchModel, Lowered, Path]
) -> None:
    model, _, folder = small
    assert format_of(folder) == "executorch" and model_file(folder) == folder / PTE_FILE
    budget, plain_budget = budget_of(folder), budget_of(plain[2])
    assert budget.format == "executorch"
    assert budget.total_bytes == budget.tensor_bytes + sum(budget.overhead.values())
    words = model.module.get_input_embeddings().weight
    (table,) = [tensor for tensor in budget.tensors if tensor.parameters == words.numel()]
    assert (table.dtype, table.bytes) == ("uint8", words.numel() // 2)
    # Equal tensors, such as those of two new normalisations, are stored once.
    distinct = {value.detach().numpy().tobytes(): value.numel() for value in model.module.parameters()}
    assert budget.parameters == plain_budget.parameters == sum(distinct.values())


def test_program_of_another_model_fails_parity(plain: tuple[TorchModel, ExecuTorchModel, Path]) -> None:
    other = tiny.encoder(num_hidden_layers=1, seed=7)
    same = Lowered(plain[1], logits_module(other))
    with pytest.raises(IntegrityError, match="In ExecuTorch the logits differ from torch by"):
        check_program_parity(same, other, examples_of(other), 1e-3)


def logits_module(model: TorchModel) -> torch.nn.Module:
    class Answers(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return model.module(**dict(zip(NAMES, values, strict=True))).logits

    return Answers()


def test_session_reports_inputs_and_refuses_invalid_ones(plain: tuple[TorchModel, ExecuTorchModel, Path]) -> None:
    session = get_runtime("executorch").open(plain[2], TARGET, threads=2)
    assert session.input_types == {name: TensorType("int64", ("batch_size", "sequence_length")) for name in NAMES}
    assert session.settings["intra_op_threads"] == 2 and session.settings["rows_at_once"] == ROWS
    with pytest.raises(InputError, match="lacks the model's input attention_mask"):
        session.predict({"input_ids": batch_of(1, 4)["input_ids"]})
    with pytest.raises(InputError, match=rf"(?s)cannot be int64 \[1, {LENGTH + 1}\].*up to {LENGTH}"):
        session.predict(batch_of(1, LENGTH + 1))
    with pytest.raises(InputError, match="cannot be int32"):
        session.predict({name: value.astype(np.int32) for name, value in batch_of(1, 4).items()})


def test_incomplete_program_is_refused(plain: tuple[TorchModel, ExecuTorchModel, Path], tmp_path: Path) -> None:
    plain[1].save(tmp_path)
    program, config = tmp_path / PTE_FILE, tmp_path / "config.json"
    whole = program.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            get_runtime("executorch").open(tmp_path, TARGET, threads=1)

    program.write_bytes(whole[:-100])
    refused(r"ends at byte \d+ of \d+")
    with pytest.raises(ModelError, match=r"ends at byte \d+ of \d+"):
        budget_of(tmp_path)
    program.write_bytes(b"\x80\x04" + whole[2:])
    refused("cannot open the program")
    program.write_bytes(b"PK" * 500)
    refused("no ExecuTorch program")
    program.write_bytes(whole)
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, INTERFACE: {**told[INTERFACE], "outputs": ["logits", "more"]}}))
    refused(r"2 inputs and 1 outputs, its config names 2 and 2")
    config.write_text(json.dumps({name: value for name, value in told.items() if name != INTERFACE}))
    refused("does not name the program's inputs")
    config.unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ExecuTorchModel.load(tmp_path, "text-classification")


def test_xnnpack_blob_with_unbounded_activation_is_read(tmp_path: Path) -> None:
    with suppress_output("process"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
        exported = torch.export.export(module, (torch.zeros(2, 4),))
        made = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    assert sorted(tensor.shape for tensor in read_pte(bytes(made.buffer), tmp_path / "model.pte")) == [(3,), (3, 4)]


def test_unsupported_operators_are_named() -> None:
    class Strange(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(hidden)

    model = tiny.encoder(num_hidden_layers=0)
    model.module.dropout = Strange()
    with pytest.raises(StageError, match=r"ExecuTorch cannot run the model: .*special_bessel_j0"):
        to_executorch(model, examples_of(model), "fp32", 4, LENGTH)


def test_stage_fulfils_the_stage_contract(ran: tuple[Ran, Lowered], tmp_path: Path) -> None:
    check_contract(ExecuTorch(), ran[0], tmp_path)
    check_reads(ExecuTorch(), ran[0])


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes() -> None:
    """Export only the head and embeddings (no layers), since each encoder layer takes half a minute per export."""
    models = [tiny.encoder(num_hidden_layers=0) for _ in range(2)]
    first, second = (to_executorch(model, examples_of(model), "int8", 4, LENGTH).model for model in models)
    assert first == second
