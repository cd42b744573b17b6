import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from compress.sources.resolve import find_model, resolve_model
from compress.utils.errors import ModelError, SampleError


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


def test_folder_is_taken_as_it_is(bert: Path) -> None:
    assert resolve_model(str(bert)) == bert


def test_folder_is_checked(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    assert "no safetensors weights" in refusal(tmp_path)


@pytest.mark.parametrize("reference", ["missing.gguf", "./missing", "a/b/c", "no such model", "model.bin"])
def test_what_can_be_no_hub_id_is_not_looked_for_there(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_offline_without_a_copy_says_what_to_do(call: str, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", OFFLINE.format(call=call)]
    done = subprocess.run(
        command,
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    )
    assert "'someone/some-model' is not a path here" in done.stdout
    assert "hf download someone/some-model" in done.stdout


def cached(home: Path, bert: Path) -> Path:
    """A repository in the layout of the Hub's cache, with links to blobs, as a download leaves it."""
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
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(bert)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("someone/some-model@v1.0", trust_remote_code=trust) == bert
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v1.0")
    assert ("*.py" in asked["allow_patterns"]) is trust
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
