"""The stage `gguf`: what it says of its file, and what it does with a file that came out wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from mergeable import save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama

from compress.data.dataset import Dataset
from compress.formats.gguf import export as gguf_export
from compress.formats.gguf.model import GgufModel
from compress.formats.gguf.stage import Gguf
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.pipeline.integrity import IntegrityCheck, ModelSize, PredictionProbe, inspector_of
from compress.stages.base import Context
from compress.tasks.registry import get_task
from compress.utils.errors import IntegrityError, ModelError, StageError


class Notes:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def track(self, items: Any, description: str, total: int) -> Any:
        return items

    def note(self, message: str) -> None:
        self.said.append(message)


def context(folder: Path, progress: Notes | None = None) -> Context:
    task = get_task("text-generation")
    data = Dataset(task.columns, {"train": tiny.table(32).select(["text"])}, ())

    def earlier(label: str) -> Any:
        raise AssertionError("reads no other model")

    return Context(task, data, 24, 0, progress or Notes(), earlier, Path, folder / "scratch")


def quantized(folder: Path) -> QuantizedCheckpoint:
    checkpoint = quantize_tiny_llama(save_mergeable_llama(folder / "source"), folder / "quantized")
    train_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint


def test_integers_are_kept_to_the_bit_and_that_is_said(tmp_path: Path) -> None:
    notes = Notes()
    converted = Gguf().run(quantized(tmp_path), context(tmp_path, notes))
    assert notes.said == ["gguf: 20 of 20 tensors are kept to the bit"]
    assert sorted(path.name for path in converted.folder.iterdir()) == [
        *("chat_template.jinja", "config.json", "model.gguf", "tokenizer.json", "tokenizer_config.json")
    ]


def test_what_is_rounded_is_said(tmp_path: Path) -> None:
    notes = Notes()
    Gguf().run(save_mergeable_llama(tmp_path / "source"), context(tmp_path, notes))
    # Two norms a layer and the last one are F32; the table and seven matrices a layer are rounded to float16.
    assert notes.said[0].startswith("gguf: 5 of 20 tensors are kept to the bit, the others within ")


def test_a_file_that_does_not_give_the_weights_back_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantized(tmp_path)
    pack = gguf_export.pack_blocks

    def wrong(weight: Any, kind: str) -> Any:
        packed = pack(weight, kind)
        packed[0, 2] ^= 1
        return packed

    monkeypatch.setattr(gguf_export, "pack_blocks", wrong)
    with pytest.raises(StageError, match="came back from the file with a difference"):
        Gguf().run(checkpoint, context(tmp_path))


def test_the_model_is_saved_by_links_and_loads_again(tmp_path: Path) -> None:
    converted = Gguf().run(quantized(tmp_path), context(tmp_path))
    (tmp_path / "saved").mkdir()
    converted.save(tmp_path / "saved")
    assert converted.file.samefile(tmp_path / "saved" / "model.gguf")
    assert GgufModel.load(tmp_path / "saved", "text-generation").file == tmp_path / "saved" / "model.gguf"
    (tmp_path / "saved" / "model.gguf").unlink()
    with pytest.raises(ModelError, match=r"holds 0 \.gguf files"):
        GgufModel.load(tmp_path / "saved", "text-generation")


def probe(folder: Path) -> PredictionProbe:
    stage_context = context(folder)
    return PredictionProbe(
        load=lambda place: GgufModel.load(place, "text-generation"),
        encode=lambda processor: stage_context.task.encode(stage_context.data.split("train"), processor, None, 24),
    )


def test_integrity_sees_every_tensor_and_asks_llama_cpp(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    converted = Gguf().run(checkpoint, context(tmp_path))
    arrays = dict(inspector_of(converted).float_arrays())
    assert (arrays["blk.0.ffn_up.weight"] == checkpoint.weight("model.layers.0.mlp.up_proj").numpy()).all()
    assert len(arrays) == len(inspector_of(converted).digests()) == 20
    integrity = IntegrityCheck("gguf", Gguf().output_spec())
    integrity.check(converted, {}, ModelSize(1000, 1000), converted.folder, probe(tmp_path))
    assert dict(integrity.findings)["predictions"] == "finite and not constant"


def test_a_scale_that_is_not_finite_is_found(tmp_path: Path) -> None:
    converted = Gguf().run(quantized(tmp_path), context(tmp_path))
    from compress.formats.gguf.model import read_gguf

    (tensor,) = (
        candidate for candidate in read_gguf(converted.file).tensors if candidate.name == "blk.1.ffn_up.weight"
    )
    content = bytearray(converted.file.read_bytes())
    content[tensor.start : tensor.start + 2] = b"\x00\x7e"  # a NaN of float16
    converted.file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"'blk\.1\.ffn_up\.weight' holds NaN"):
        IntegrityCheck("gguf", Gguf().output_spec()).check(
            converted, {}, ModelSize(1000, 1000), converted.folder, probe(tmp_path)
        )


def test_without_llama_cpp_the_report_says_that_nobody_asked_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = Gguf().run(quantized(tmp_path), context(tmp_path))
    monkeypatch.setattr("compress.formats.gguf.llama_cpp_library.PACKAGE", "no-such-package")
    integrity = IntegrityCheck("gguf", Gguf().output_spec())
    integrity.check(converted, {}, ModelSize(1000, 1000), converted.folder, probe(tmp_path))
    assert dict(integrity.findings)["predictions"].startswith("not looked at: the package no-such-package is not")


def test_a_checkpoint_that_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = quantize_tiny_llama(save_mergeable_llama(tmp_path / "source"), tmp_path / "quantized", group_size=16)
    with pytest.raises(ModelError, match="Groups of 16"):
        Gguf().run(Checkpoint(source.folder), context(tmp_path))
