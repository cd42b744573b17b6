"""Tests of the real packages: rows compared with an independent reading of the raw files."""

import html
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pyarrow.parquet as pq
import pytest

from compress.data.samples.fetch import MANIFEST, cache_root, cached_directory, sample_directory

pytestmark = pytest.mark.slow


def plain(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).lower().split())


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, list[tuple[float, str]]]:
    """Return (rating, text) of each file of the archive, which is downloaded here with pip."""
    folder = tmp_path_factory.mktemp("raw")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "vaderSentiment==0.5", "-d", str(folder)], check=True)
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip") as package:
        inner = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
            content = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode()
            rows = [line.split("\t") for line in content.split("\r\n") if line]
            files[name] = [(float(rating), text) for _, rating, text in rows]
    return files


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Use a cache in which nothing is older than this session.

    On a new machine that is the user's cache, so that other tests need not fetch and prepare the same samples again.
    """
    began = float(os.environ["COMPRESS_TESTS_BEGAN"])  # by tests/conftest.py
    if all(manifest.stat().st_mtime > began for manifest in cache_root().glob(f"*/{MANIFEST}")):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_movie_reviews_hold_each_rated_text_once(raw):
    files = sample_directory("movie-reviews")
    tables = {name: pq.read_table(files / f"{name}.parquet") for name in ("train", "validation", "test")}
    expected = {plain(t): r > 0 for r, t in raw["movieReviewSnippets"] if abs(r) > 0.5}
    assert len(tables["test"]) == 2_000
    assert len(tables["validation"]) == 500
    assert len(tables["train"]) == len(expected) - 2_500
    is_positive = {
        plain(row["text"]): row["label"] == "positive" for table in tables.values() for row in table.to_pylist()
    }
    assert is_positive == expected  # as many keys as rows, so there are no duplicate texts
    for table in tables.values():
        positive = sum(label == "positive" for label in table["label"].to_pylist())
        assert 0.45 < positive / len(table) < 0.55
        assert set(table["label"].to_pylist()) == {"positive", "negative"}


def test_snippets_hold_all_other_texts(raw):
    texts = pq.read_table(sample_directory("snippets") / "unlabeled.parquet")["text"].to_pylist()
    sizes = {"amazonReviewSnippets": 3_708, "nytEditorialSnippets": 5_190, "tweets": 4_200}
    assert {name: len(raw[name]) for name in sizes} == sizes
    neutral = [t for r, t in raw["movieReviewSnippets"] if abs(r) <= 0.5]
    others = [t for name in raw if name != "movieReviewSnippets" for _, t in raw[name]]
    labeled = {plain(t) for r, t in raw["movieReviewSnippets"] if abs(r) > 0.5}
    expected = {plain(text) for text in neutral + others} - labeled
    assert len(texts) == len(expected)
    assert {plain(text) for text in texts} == expected
    assert not [text for text in texts if "&amp;" in text or "&lt;" in text or "&#" in text]


def test_minilm_loads_in_transformers():
    from transformers import AutoModel

    folder = sample_directory("minilm")
    assert cached_directory("minilm") == folder
    assert AutoModel.from_pretrained(folder).num_parameters() == 22_713_216


def test_wiki_holds_each_article_once_without_markup():
    import re

    files = sample_directory("wiki")
    tables = {name: pq.read_table(files / f"{name}.parquet") for name in ("train", "validation", "test")}
    titles = [title for table in tables.values() for title in table["title"].to_pylist()]
    assert len(titles) == len(set(titles)) == 106
    assert {name: len(table) for name, table in tables.items()} == {"train": 88, "validation": 6, "test": 12}
    texts = {name: table["text"].to_pylist() for name, table in tables.items()}
    assert sum(map(len, texts["test"])) > 400_000
    everything = "\n".join(text for part in texts.values() for text in part)
    assert not re.findall(r"\{\{|\}\}|\[\[|\]\]|<ref|'''|^\{\||Category:", everything, re.MULTILINE)


def test_verses_are_aligned_pairs_of_two_translations():
    import shutil

    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get here")
    files = sample_directory("verses")
    tables = {name: pq.read_table(files / f"{name}.parquet").to_pylist() for name in ("train", "validation", "test")}
    counts = {name: len(rows) for name, rows in tables.items()}
    assert sum(counts.values()) > 30_900
    assert 5_000 <= counts["test"] < 5_200
    rows = {row["verse"]: row for part in tables.values() for row in part}
    assert rows["Genesis 1:1"]["text"] == "In the beginning, God created the heavens and the earth."
    assert rows["Genesis 1:1"]["pair"] == "In the beginning God created the heaven and the earth."
    assert rows["Revelation of John 22:20"]["pair"].endswith("Amen. Even so, come, Lord Jesus.")
    # A pair shares words: a shift by one verse anywhere would leave few that do.
    shared = [len({*plain(row["text"]).split()} & {*plain(row["pair"]).split()}) > 1 for row in rows.values()]
    assert sum(shared) / len(shared) > 0.97


def test_similarity_holds_every_pair_of_three_sources() -> None:
    folder = sample_directory("similarity")
    tables = {path.stem: pq.read_table(path) for path in folder.glob("*.parquet")}
    # Pairs of the 50 documents of Lee et al. (2005); the other names contain their number of pairs.
    sizes = {"lee": 50 * 49 // 2, "wordsim353": 353, "simlex999": 999}
    assert {name: len(table) for name, table in tables.items()} == sizes
    assert any("£3,000" in text for text in tables["lee"]["pair"].to_pylist())
