from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_samples import write_llama, write_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.models.folder_checks import check_weights_finite
from compress.sources.resolve import resolve_model
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key as llama.cpp stores them -> rows as transformers wants them."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_gguf_becomes_a_folder_with_the_weights_that_were_written(tmp_path: Path) -> None:
    values = write_llama(tmp_path / "tiny.gguf")

    folder = resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")

    assert folder.parent == tmp_path / "cache"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    check_weights_finite(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    layer = "model.layers.0"
    for stored, name in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_v.weight": f"{layer}.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": f"{layer}.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": f"{layer}.mlp.gate_proj.weight",
        "blk.0.ffn_down.weight": f"{layer}.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(state[name], values[stored]), name
    query = llama_cpp_order(values["blk.0.attn_q.weight"], heads=1)
    assert np.array_equal(state[f"{layer}.self_attn.q_proj.weight"], query)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert getattr(model.config, "quantization_config", None) is None
    tokens = AutoTokenizer.from_pretrained(folder)("abcd", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


class Shown(SilentProgress):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        """Yield ``items`` and note how many there were."""
        count = 0
        for count, item in enumerate(items, 1):  # noqa: B007
            yield item
        self.steps.append((description, total, count))


def test_the_run_s_own_progress_shows_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = write_llama(tmp_path / "tiny.gguf")
    shown = Shown()
    resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", progress=shown)
    assert shown.steps == [("dequantizing tensors", len(values), len(values))]
    assert "GGUF" not in capfd.readouterr().err


def test_the_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, parsed = gguf.GGUFReader, []

    def watched(path: str) -> gguf.GGUFReader:
        parsed.append(path)
        return read(path)

    monkeypatch.setattr(gguf, "GGUFReader", watched)
    write_llama(tmp_path / "tiny.gguf")
    resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert len(parsed) == 1
    assert gguf.GGUFReader is watched, "another file is not taken for this one"


def test_second_call_takes_the_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "tiny.gguf")
    first = resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")

    def again(*_: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr("compress.sources.gguf_conversion._write", again)
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    assert resolve_model(str(tmp_path / "renamed.gguf"), cache=tmp_path / "cache") == first


def test_gguf_that_is_no_whole_model_leaves_nothing_behind(tmp_path: Path) -> None:
    write_tensors(tmp_path / "part.gguf")
    with pytest.raises(ModelError, match="not a whole model: it holds 256 weights"):
        resolve_model(str(tmp_path / "part.gguf"), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_digits_are_parted_before_words_where_llama_cpp_does_so(tmp_path: Path) -> None:
    """llama.cpp cuts "a  1" into "a  " and "1" first, so that the two spaces are one token."""
    tokens = {}
    for pre in ("smollm", "gpt-2"):
        write_llama(tmp_path / f"{pre}.gguf", more=("Ġ", "ĠĠ", "1"), pre=pre)
        folder = resolve_model(str(tmp_path / f"{pre}.gguf"), cache=tmp_path / "cache")
        tokens[pre] = AutoTokenizer.from_pretrained(folder).tokenize("a  1")
    assert tokens == {"smollm": ["a", "ĠĠ", "1"], "gpt-2": ["a", "Ġ", "Ġ", "1"]}
