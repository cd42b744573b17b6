"""Tests of LiteRT files: logits in the plain LiteRT interpreter are compared with torch; invalid input is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from compress.formats.litert.conversion import quantize_litert
from compress.formats.litert.model import LITERT_FILE, LiteRtModel, read_litert
from compress.formats.litert.stage import LiteRt
from compress.formats.model_file import format_of, model_file
from compress.formats.runtime import TensorType, get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.models.model import TorchModel
from compress.pipeline.integrity import inspector_of
from compress.utils.environment import has_package
from compress.utils.errors import InputError, ModelError, StageError

# The import takes seconds in each process that collects tests.
if not has_package("litert-torch"):
    pytest.skip("no litert-torch here", allow_module_level=True)
TARGET = TARGETS["litert"]
WORDS = "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Written:
    """Tiny classifier, the folder of its fp32 LiteRT file and the notes of the stage."""

    model: TorchModel
    folder: Path
    remarks: tuple[str, ...]

    @property
    def content(self) -> bytes:
        return (self.folder / LITERT_FILE).read_bytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    model, context = tiny.encoder(), tiny.context()
    folder = tmp_path_factory.mktemp("litert") / "fp32"
    folder.mkdir()
    LiteRt(precision="fp32", lengths=2).run(model, context).save(folder)
    return Written(model, folder, tuple(context.notes))


@pytest.fixture(scope="module")
def small(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same classifier with 8-bit weights and a 4-bit embedding table."""
    folder = tmp_path_factory.mktemp("litert") / "int8"
    folder.mkdir()
    LiteRtModel({LITERT_FILE: quantize_litert(written.content, "int8", WORDS, 4, 32)}, {}).save(folder)
    return folder


def batch(lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return random token ids and masks [rows, longest] and labels, which the graph does not take."""
    generator = np.random.default_rng(3)
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": generator.integers(5, 100, mask.shape) * mask, "attention_mask": mask, "labels": mask[:, 0]}


def torch_logits(model: TorchModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
        logits: np.ndarray = model.module(input_ids=ids, attention_mask=mask).logits.numpy()
    return logits


def logits_of(folder: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return get_runtime("litert").open(folder, TARGET, threads=1).predict(inputs)["logits"]


def test_litert_interpreter_matches_torch_at_each_signature(written: Written) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(written.folder / LITERT_FILE))
    longest = int(tiny.context().encode("train", written.model).lengths().max())
    names = sorted(interpreter.get_signature_list(), key=lambda name: int(name.removeprefix("length_")))
    assert len(names) == 2 and longest <= 24 and names[1] == "length_24"
    for name in names:
        length = int(name.removeprefix("length_"))
        inputs = batch((length - 2, length))
        runner = interpreter.get_signature_runner(name)
        assert {details["dtype"] for details in runner.get_input_details().values()} == {np.int32}
        for row, logits in enumerate(torch_logits(written.model, inputs)):
            feed = {key: inputs[key][row : row + 1].astype(np.int32) for key in ("input_ids", "attention_mask")}
            np.testing.assert_allclose(runner(**feed)["logits"][0], logits, atol=1e-5)


def test_rows_and_batches_of_any_size_match_torch(written: Written) -> None:
    for lengths in ((1,), (3, 24, 9), (24,) * 5, (2, 2)):
        inputs = batch(lengths)
        np.testing.assert_allclose(logits_of(written.folder, inputs), torch_logits(written.model, inputs), atol=1e-5)


def test_weights_are_stored_once_under_parameter_names(written: Written) -> None:
    stored = {tensor.name: tensor for tensor in read_litert(written.content, written.folder / LITERT_FILE)}
    for name in (WORDS, "bert.embeddings.position_embeddings.weight", "bert.pooler.dense.weight"):
        np.testing.assert_array_equal(stored[name].values(written.content), written.model.tensors()[name].numpy())
    budget = budget_of(written.folder)
    assert budget.format == "litert" and format_of(written.folder) == "litert"
    assert model_file(written.folder) == written.folder / LITERT_FILE
    assert budget.total_bytes == budget.tensor_bytes + sum(budget.overhead.values())
    # Scales of one and shifts of zero, which these normalisations have, are folded away; nothing is stored twice.
    assert budget.parameters == pytest.approx(written.model.parameters(), rel=0.02)


def test_infinite_mask_constant_is_not_reported_as_a_weight(written: Written) -> None:
    tensors = read_litert(written.content, written.folder / LITERT_FILE)
    assert any(np.isinf(tensor.values(written.content)).any() for tensor in tensors if "float" in tensor.dtype)
    looked_into = dict(inspector_of(LiteRtModel({LITERT_FILE: written.content}, {})).float_arrays())
    assert WORDS in looked_into and all(np.isfinite(values).all() for values in looked_into.values())


def test_quantized_logits_are_close_to_float(written: Written, small: Path) -> None:
    inputs = batch((4, 9, 24, 17))
    logits = torch_logits(written.model, inputs)
    near = 0.1 * np.abs(logits).max()
    np.testing.assert_allclose(logits_of(small, inputs), logits, atol=near)
    assert np.abs(logits_of(small, inputs) - logits).max() > 1e-4
    eight = quantize_litert(written.content, "int8_weights", WORDS, None, 32)
    (folder := small.parent / "weights").mkdir()
    LiteRtModel({LITERT_FILE: eight}, {}).save(folder)
    np.testing.assert_allclose(logits_of(folder, inputs), logits, atol=near / 2)


def test_embedding_table_has_4_bits_within_half_a_step(written: Written, small: Path) -> None:
    content = (small / LITERT_FILE).read_bytes()
    stored = {tensor.name: tensor for tensor in read_litert(content, small / LITERT_FILE)}
    table, rows = stored[WORDS], written.model.tensors()[WORDS].numpy()
    assert (table.dtype, table.shape, table.bytes) == ("int4", rows.shape, rows.size // 2)
    packed = np.frombuffer(content, np.uint8, table.bytes, table.start)
    integers = np.stack([packed & 15, packed >> 4], axis=1).reshape(rows.shape).astype(np.int8)
    integers = np.where(integers > 7, integers - 16, integers)
    (scales,) = (part for part in stored.values() if part.role == "quantization" and part.shape == (len(rows), 1))
    steps = scales.values(content).astype(np.float32)
    assert (np.abs(integers * steps - rows) <= 0.51 * steps).all()
    assert stored["bert.embeddings.position_embeddings.weight"].dtype == "int8"
    assert budget_of(small).parameters == budget_of(written.folder).parameters


def test_session_reports_inputs_and_settings(written: Written) -> None:
    session = get_runtime("litert").open(written.folder, TARGET, threads=2)
    assert session.input_types["input_ids"] == TensorType("int32", (None, None))
    assert session.output_types == {"logits": TensorType("float32", (None, 2))}
    assert session.settings["intra_op_threads"] == 2 and session.settings["lengths"].endswith(", 24")
    with pytest.raises(InputError, match="lacks the model's input attention_mask"):
        session.predict({"input_ids": batch((3,))["input_ids"]})
    with pytest.raises(InputError, match=r"(?s)A row of 25 tokens does not fit.*at most 24"):
        session.predict(batch((3, 25)))


def test_incomplete_file_is_refused(written: Written, tmp_path: Path) -> None:
    file = tmp_path / LITERT_FILE
    for end in (6, 1000, len(written.content) // 2, len(written.content) - 100):
        file.write_bytes(written.content[:end])
        for opens in (
            lambda: budget_of(file),
            lambda: LiteRtModel.load(tmp_path, tiny.TASK),
            lambda: get_runtime("litert").open(tmp_path, TARGET, threads=1),
        ):
            with pytest.raises(ModelError, match=r"cut or broken|not in LiteRT's format") as raised:
                opens()
            assert raised.value.where == str(file)
    file.write_bytes(b"another format" * 9)
    with pytest.raises(ModelError, match="not in LiteRT's format"):
        budget_of(file)


def test_unsupported_settings_are_refused_early() -> None:
    with pytest.raises(ValidationError, match="ascending"):
        LiteRt(lengths=(16, 8))
    with pytest.raises(ValidationError, match="set precision: int8"):
        LiteRt(precision="fp32", embedding_bits=4)
    with pytest.raises(StageError, match="longest signature has 4 tokens"):
        LiteRt(lengths=(2, 4)).run(tiny.encoder(), tiny.context())
    with pytest.raises(StageError, match="longest signature has 64 tokens"):
        LiteRt(lengths=(64,)).run(tiny.encoder(), replace(tiny.context(), max_length=64))
