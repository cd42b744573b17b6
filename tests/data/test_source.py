"""Tests of data sources: which file, sample or Hub dataset a split refers to, and errors of wrong sources."""

import sys
from pathlib import Path

import pytest

from compress.data.config import DataConfig
from compress.data.source import HubSplit, Undivided, locate_split, locate_unlabeled, read_hub_split, rows_of
from compress.utils.errors import DataError, MissingExtraError


def closed(name):
    return None


def locate(folder, split="train", open_sample=closed, **config):
    return locate_split(DataConfig(**config), split, folder, open_sample)


def failure(folder, **config) -> DataError:
    with pytest.raises(DataError) as caught:
        locate(folder, **config)
    return caught.value


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text\na\n")
    return path


def test_paths_are_resolved_from_source_recipe_and_working_directory(tmp_path, monkeypatch):
    work, recipe = tmp_path / "here", tmp_path / "recipe"
    work.mkdir()
    recipe.mkdir()
    monkeypatch.chdir(work)
    config = {"source": "data", "splits": {"train": "a.csv"}}
    make(work / "a.csv")
    (recipe / "data").mkdir()
    assert locate(recipe, **config).resolve() == work / "a.csv"
    make(recipe / "a.csv")
    assert locate(recipe, **config) == recipe / "a.csv"
    make(recipe / "data" / "a.csv")
    assert locate(recipe, **config) == recipe / "data" / "a.csv"


def test_absolute_path_is_unchanged(tmp_path):
    path = make(tmp_path / "a.csv")
    assert locate(Path("elsewhere"), splits={"train": str(path)}) == path


def test_missing_file_is_reported_with_suggestion_and_searched_folders(tmp_path):
    make(tmp_path / "reviews_train.csv")
    error = failure(tmp_path, splits={"train": "review_train.csv"})
    assert error.where == "data.splits.train"
    assert str(tmp_path) in error.expected
    assert "reviews_train.csv" in error.hint


def test_a_split_without_a_source_must_be_a_data_file(tmp_path):
    error = failure(tmp_path, splits={"train": "train.docx"})
    assert "'train.docx'" in error.what
    assert ".csv" in error.expected


def test_missing_split_is_reported_with_available_splits(tmp_path):
    make(tmp_path / "data" / "train.csv")
    make(tmp_path / "data" / "dev.csv")
    make(tmp_path / "data" / "notes.txt")
    error = failure(tmp_path, split="validation", source="data")
    assert "no split 'validation'" in error.what
    assert error.expected == "one of its splits: dev, train"


def test_folder_with_two_files_for_one_split_is_rejected(tmp_path):
    make(tmp_path / "data" / "train.csv")
    make(tmp_path / "data" / "train.jsonl")
    assert "train.csv, train.jsonl" in failure(tmp_path, source="data").what


def test_text_files_are_splits_only_without_tables_and_folders(tmp_path):
    text = make(tmp_path / "data" / "train.txt")
    assert locate(tmp_path, source="data") == text
    folder = tmp_path / "data" / "train"
    folder.mkdir()
    assert locate(tmp_path, source="data") == folder


def test_spreadsheet_is_refused_with_advice_to_save_it_as_csv(tmp_path):
    make(tmp_path / "data.xlsx")
    error = failure(tmp_path, splits={"train": "data.xlsx"})
    assert error.where == "data.splits.train"
    assert "as CSV" in error.hint


def test_file_as_source_has_the_usual_splits_and_no_others(tmp_path):
    path = make(tmp_path / "a.csv")
    other = make(tmp_path / "b.csv")
    splits = {"train": "train", "test": "b.csv", "code": "code"}
    assert locate(tmp_path, source="a.csv", splits=splits) == Undivided(path)
    assert locate(tmp_path, source="a.csv", splits=splits, split="test") == other
    error = failure(tmp_path, source="a.csv", splits=splits, split="code")
    assert "no split 'code'" in error.what
    assert "train, validation, test" in error.expected


def test_class_folders_are_undivided_unless_they_are_named_as_splits(tmp_path):
    for name in ("photos/cat/1.png", "photos/dog/1.png", "sets/train/cat/1.png", "sets/test/cat/1.png"):
        make(tmp_path / name)
    assert locate(tmp_path, source="photos") == Undivided(tmp_path / "photos")
    assert locate(tmp_path, source="photos", splits={"train": "cat"}) == tmp_path / "photos/cat"
    assert locate(tmp_path, source="sets", splits={"train": "train", "test": "test"}) == tmp_path / "sets/train"
    assert "no split 'validation'" in failure(tmp_path, source="sets", split="validation").what


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "nowhere.csv", "no such folder"])
def test_source_that_is_neither_path_nor_dataset_id_is_rejected(tmp_path, source):
    error = failure(tmp_path, source=source)
    assert "does not exist" in error.what
    assert error.where == "data.source"


@pytest.mark.parametrize("source", ["imdb", "stanfordnlp/imdb"])
def test_other_sources_are_dataset_ids(tmp_path, source):
    assert locate(tmp_path, source=source) == HubSplit(source, "train")


def test_samples_are_opened_only_by_given_function(tmp_path):
    make(tmp_path / "train.parquet")
    assert locate(tmp_path, source="sample:movie-reviews") is None
    location = locate(tmp_path, source="sample:movie-reviews", open_sample=lambda name: tmp_path)
    assert location == tmp_path / "train.parquet"
    with pytest.raises(DataError, match="is a model") as error:
        locate(tmp_path, source="sample:minilm")
    assert "compress samples" in error.value.hint


def test_unlabeled_text_comes_from_file_or_sample(tmp_path):
    path = make(tmp_path / "a.csv")
    assert locate_unlabeled("a.csv", tmp_path, closed) == path
    assert locate_unlabeled("sample:snippets", tmp_path, closed) is None
    with pytest.raises(DataError, match="no unlabeled text"):
        locate_unlabeled("sample:movie-reviews", tmp_path, lambda name: tmp_path)
    make(tmp_path / "a.docx")
    with pytest.raises(DataError, match=r"a\.docx is not a supported data file"):
        locate_unlabeled("a.docx", tmp_path, closed)
    with pytest.raises(DataError, match="does not exist"):
        locate_unlabeled("b.csv", tmp_path, closed)


def test_class_ids_of_a_hub_dataset_become_names():
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows = rows_of(dataset, "imdb (train)", {"label"})
    assert rows.names == ("text", "label")
    assert rows.columns == {"label": ["pos", "neg", None]}
    assert rows.place(2) == "imdb (train), row 3"


def test_hub_dataset_without_datasets_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as error:
        read_hub_split(HubSplit("no/such", "train"), {"text"})
    assert error.value.hint == "pip install 'compress-models[hub]'"


def test_hub_dataset_without_network_is_reported(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="'no/such' cannot be fetched: no network") as error:
        read_hub_split(HubSplit("no/such", "train"), {"text"})
    assert "connect and try again" in error.value.hint
