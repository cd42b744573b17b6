"""Tests of the resolution of a model's source, and of conversion from GGUF."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_samples import write_llama, write_tensors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from compress.models.folder_checks import check_weights_finite
from compress.sources.resolve import find_model, resolve_model
from compress.utils.errors import ModelError, SampleError
from compress.utils.progress import SilentProgress


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
    BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def refusal(reference: str | Path, **options: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(reference), **options)
    return str(caught.value)


def test_folder_is_used_unchanged(bert: Path) -> None:
    assert resolve_model(str(bert)) == bert


def test_folder_is_checked(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    assert "no safetensors weights" in refusal(tmp_path)


@pytest.mark.parametrize("reference", ["missing.gguf", "./missing", "a/b/c", "no such model", "model.bin"])
def test_invalid_hub_id_causes_no_hub_request(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    message = refusal(reference)
    assert f"There is no model {reference!r}" in message
    assert "sample:NAME" in message


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    assert "is a pickle" in refusal(tmp_path / "w.pth")
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert "Not a whole ONNX file" in refusal(tmp_path / "m.onnx")


def test_folder_with_several_gguf_files_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    message = refusal(tmp_path)
    assert "2 GGUF files" in message
    assert "a.gguf, b.gguf" in message


def test_unknown_sample_is_refused() -> None:
    with pytest.raises(SampleError):
        resolve_model("sample:there-is-none")


OFFLINE = """
import sys
from compress.utils.errors import ModelError
from compress.sources.resolve import {call}
try:
    {call}("someone/some-model")
except ModelError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("call", ["resolve_model", "find_model"])
def test_offline_without_a_cached_copy_gives_advice(call: str, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", OFFLINE.format(call=call)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert "'someone/some-model' is not a path here" in done.stdout
    assert "hf download someone/some-model" in done.stdout


def cached(home: Path, bert: Path) -> Path:
    """Write a repository in the layout of the Hub's cache, with links to blobs, as a download leaves it."""
    revision = "0" * 39 + "1"
    repository = home / "hub" / "models--someone--some-model"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for file in bert.iterdir():
        (repository / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


@pytest.mark.parametrize("call", [resolve_model, find_model])
def test_cached_repository_is_found_without_network(call, bert: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = cached(tmp_path, bert)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert call("someone/some-model") == snapshot
    assert call(f"someone/some-model@{snapshot.name}") == snapshot


@pytest.mark.parametrize("trust", [False, True])
def test_python_files_are_fetched_only_when_trusted(trust: bool, bert: Path, monkeypatch) -> None:
    requests = {}

    def download(name: str, **options: object) -> str:
        requests.update(options, name=name)
        return str(bert)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("someone/some-model@v1.0", trust_remote_code=trust) == bert
    assert (requests["name"], requests["revision"]) == ("someone/some-model", "v1.0")
    assert ("*.py" in requests["allow_patterns"]) is trust
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in requests["allow_patterns"])


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Convert rows of a query or key from llama.cpp's order to transformers' order."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_gguf_is_converted_to_a_folder_with_equal_weights(tmp_path: Path) -> None:
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
    """A progress that records each tracked step."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def track(self, items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        """Yield ``items`` and record their number."""
        count = 0
        for count, item in enumerate(items, 1):  # noqa: B007
            yield item
        self.steps.append((description, total, count))


def test_conversion_reports_to_the_progress_of_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = write_llama(tmp_path / "tiny.gguf")
    shown = Shown()
    resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache", progress=shown)
    assert shown.steps == [("dequantizing tensors", len(values), len(values))]
    assert "GGUF" not in capfd.readouterr().err


def test_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, parsed = gguf.GGUFReader, []

    def watched(path: str) -> gguf.GGUFReader:
        parsed.append(path)
        return read(path)

    monkeypatch.setattr(gguf, "GGUFReader", watched)
    write_llama(tmp_path / "tiny.gguf")
    resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")
    assert len(parsed) == 1
    assert gguf.GGUFReader is watched, "another file is not taken for this one"


def test_second_conversion_is_a_cache_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "tiny.gguf")
    first = resolve_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache")

    def again(*_: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr("compress.sources.conversions._write", again)
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    assert resolve_model(str(tmp_path / "renamed.gguf"), cache=tmp_path / "cache") == first


def test_incomplete_gguf_leaves_no_files_behind(tmp_path: Path) -> None:
    write_tensors(tmp_path / "part.gguf")
    with pytest.raises(ModelError, match="not a whole model: it holds 256 weights"):
        resolve_model(str(tmp_path / "part.gguf"), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_digits_are_split_before_words_as_in_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp first cuts "a  1" into "a  " and "1", so that the two spaces are one token."""
    tokens = {}
    for pre in ("smollm", "gpt-2"):
        write_llama(tmp_path / f"{pre}.gguf", more=("Ġ", "ĠĠ", "1"), pre=pre)
        folder = resolve_model(str(tmp_path / f"{pre}.gguf"), cache=tmp_path / "cache")
        tokens[pre] = AutoTokenizer.from_pretrained(folder).tokenize("a  1")
    assert tokens == {"smollm": ["a", "ĠĠ", "1"], "gpt-2": ["a", "Ġ", "Ġ", "1"]}
