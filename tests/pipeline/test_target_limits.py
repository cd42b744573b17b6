"""Tests of a target's size and memory limits: counted bytes, and the reasons reported for a missed limit."""

from __future__ import annotations

import csv
import zlib
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save
from onnx_graphs import onnx_model

from compress.formats.target_profile import TargetProfile
from compress.formats.targets import find_profile
from compress.pipeline.target_limits import explained, shipped, target_limits
from compress.report.limits import check_limits
from compress.results.report import LimitResult, Measurement

TABLE = np.random.default_rng(0).standard_normal((400, 16), np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a graph with one [400, 16] embedding table and a highly compressible tokenizer file."""
    nodes = [helper.make_node("Gather", ["words", "input_ids"], ["rows"])]
    ids = {"input_ids": (TensorProto.INT64, ["batch"])}
    save(onnx_model(nodes, ids, {"rows": ["batch", 16]}, {"words": TABLE}), tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_text("the same words " * 1000)
    return tmp_path


def with_budget(name: str, most: int) -> TargetProfile:
    return replace(find_profile(name), max_bytes=most)


def check_size_limit(profile: TargetProfile, folder: Path) -> LimitResult:
    shipped_size = shipped(profile, folder)
    rows = [
        Measurement(model="final", metric="shipped_bytes", target=profile.name, value=shipped_size.total, unit="bytes")
    ]
    (result,) = check_limits(target_limits([profile], rows), rows)
    return explained(result, [profile], {profile.name: folder}, {profile.name: shipped_size})


def test_download_counts_compressed_bytes_and_installation_plain_ones(folder: Path) -> None:
    plain = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert dict(shipped(find_profile("linux-arm64"), folder).model) == plain
    # zlib's own format has a header of 2 bytes and a checksum of 4 around the same deflate stream.
    deflated = {path.name: len(zlib.compress(path.read_bytes(), 9)) - 6 for path in folder.iterdir()}
    assert dict(shipped(find_profile("android"), folder).model) == deflated
    assert deflated["tokenizer.json"] < plain["tokenizer.json"] / 50


def test_runtime_counts_only_where_it_ships_with_model(folder: Path) -> None:
    (record,) = (file for file in files("onnxruntime") or () if file.name == "RECORD")
    listed = {row[0]: int(row[2]) for row in csv.reader(record.read_text().splitlines()) if row[2]}
    runtime = shipped(find_profile("desktop"), folder).runtime
    # RECORD lists every file's size but its own, and omits compiled .pyc files.
    assert runtime is not None and sum(listed.values()) <= runtime < 1.2 * sum(listed.values())
    assert shipped(find_profile("android"), folder).runtime is None


def test_met_size_limit_reports_what_was_counted(folder: Path) -> None:
    result = check_size_limit(with_budget("android", 1_000_000), folder)
    assert result.passed
    assert result.reason == "compressed; without the runtime, which is not installed here"


def test_missed_size_limit_names_largest_parts_and_remedies(folder: Path) -> None:
    result = check_size_limit(with_budget("android", 20_000), folder)
    assert result.missed and result.value is not None and result.value > 20_000
    reason = str(result.reason)
    assert "biggest: model.onnx 0.02 MB" in reason and "the largest tensor, words, 0.03 MB as stored" in reason
    assert "100% of the weights are float32: the stage onnx_int8" in reason
    assert "words [400, 16], is 100% of them: for an embedding, trim_vocabulary" in reason


def test_runtime_larger_than_size_limit_is_named(folder: Path) -> None:
    reason = str(check_size_limit(with_budget("desktop", 1_000_000), folder).reason)
    assert "biggest: the runtime " in reason and "the runtime alone has " in reason


def test_memory_limit_applies_to_measured_target() -> None:
    profile = replace(find_profile("cpu"), max_memory_bytes=100)
    metrics = ("peak_memory_bytes_batch_32", "peak_memory_bytes_context_128")
    rows = [Measurement(model="final", metric=name, target="cpu", value=99, unit="bytes") for name in metrics]
    (limit,) = target_limits([profile], rows)
    assert (limit.metric, limit.target, limit.at_most) == ("peak_memory_bytes_context_128", "cpu", 100)
    (result,) = check_limits([limit], rows)
    assert result.passed
    (missed,) = check_limits(target_limits([replace(profile, max_memory_bytes=98)], rows), rows)
    assert missed.missed
