import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.models.folder_checks import check_model_folder, check_weights_finite, tokenizer_rows, weight_files
from compress.utils.errors import ModelError


def make_folder(folder: Path, *, vocab_size: int = 4, tokens: int = 4) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": vocab_size}))
    vocabulary = {f"t{i}": i for i in range(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocabulary}}))
    save_file({"w": np.ones((4, 2), np.float32)}, folder / "model.safetensors")
    return folder


def shard(folder: Path, mapping: dict[str, str]) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_whole_folder_passes(tmp_path: Path) -> None:
    check_model_folder(make_folder(tmp_path / "m"))


def test_missing_folder_and_missing_or_broken_config_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none")
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json holds list" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_pickle_is_refused_with_conversion_advice(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin is a pickle" in message
    assert "use_safetensors=False" in message
    assert f"save_pretrained('{folder}-safetensors')" in message


def test_folder_without_weights_or_with_adapter_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "adapter" in refusal(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"x")
    assert "no safetensors weights" in refusal(folder)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    message = refusal(folder)
    assert f"of {len(data) - 1} bytes is truncated" in message


def test_shards_must_exist_and_match_the_index(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.ones(2, np.float32)}, folder / "two.safetensors")
    shard(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    check_model_folder(folder)
    assert [file.name for file in weight_files(folder)] == ["one.safetensors", "two.safetensors"]

    shard(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    assert "1 of 2 tensors are not where" in refusal(folder)
    shard(folder, {"a": "two.safetensors", "b": "one.safetensors"})
    assert "2 of 2 tensors are not where" in refusal(folder)
    shard(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    assert "shard 'three.safetensors' is missing" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1}}))
    assert "no usable weight_map" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "sub/../../out.safetensors", "sub/../in.safetensors", "{absolute}", "link.safetensors"],
)
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m")
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "out.safetensors")
    save_file({"a": np.ones(2, np.float32)}, folder / "in.safetensors")
    (folder / "sub").mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    shard(folder, {"a": name.format(absolute=tmp_path / "out.safetensors")})
    assert "lies outside the model folder" in refusal(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    folder = make_folder(tmp_path / "snapshots" / "0123abc")
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "blobs" / "f00")
    (folder / "one.safetensors").symlink_to("../../blobs/f00")
    shard(folder, {"a": "one.safetensors"})
    check_model_folder(folder)


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    check_model_folder(folder)


def test_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    message = refusal(make_folder(tmp_path / "m", vocab_size=4, tokens=7))
    assert "need 7 embedding rows" in message
    assert "the model has 4" in message
    check_model_folder(make_folder(tmp_path / "smaller", vocab_size=7, tokens=4))


def test_vocabulary_size_of_nested_text_config_is_used(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tokens=7)
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 6}}))
    assert "the model has 6" in refusal(folder)


def test_tokenizer_rows_are_the_largest_id_plus_one(tmp_path: Path) -> None:
    def rows(files: dict[str, object]) -> int | None:
        for old in tmp_path.iterdir():
            old.unlink()
        for name, content in files.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tokenizer_rows(tmp_path)

    added = [{"id": 9, "content": "<x>"}]
    assert rows({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 5}}}}) == 6
    assert rows({"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": added}}) == 10
    assert rows({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}}) == 2
    assert rows({"vocab.txt": "a\nb\nc\n"}) == 3
    assert rows({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 2}}) == 3
    assert rows({"spiece.model": "binary"}) is None
    with pytest.raises(ModelError, match="no vocabulary"):
        rows({"tokenizer.json": {"model": None}})


@pytest.mark.parametrize(("dtype", "bad"), [(np.float32, np.nan), (np.float16, np.inf), (ml_dtypes.bfloat16, -np.inf)])
def test_non_finite_values_are_named(tmp_path: Path, dtype: type, bad: float) -> None:
    folder = make_folder(tmp_path / "m")
    values = np.ones((5, 3), np.float32)
    save_file({"fine": values.astype(dtype)}, folder / "model.safetensors")
    check_weights_finite(folder)
    values[4, 2] = bad
    save_file({"fine": np.ones(3, dtype), "layer.w": values.astype(dtype)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 of 15 values of the tensor 'layer\.w'"):
        check_weights_finite(folder)


def test_end_of_a_large_tensor_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.models.folder_checks.CHUNK_ELEMENTS", 4)
    folder = make_folder(tmp_path / "m")
    values = np.zeros(11, np.float32)
    values[[3, 10]] = np.nan
    save_file({"w": values, "index": np.arange(3)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="2 of 11 values"):
        check_weights_finite(folder)
