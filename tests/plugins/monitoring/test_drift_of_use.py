"""Tests of input drift: features and activation ranges against known values, and the command on planted shifts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import tiny
from onnx import helper, numpy_helper
from onnx_graphs import onnx_model
from pyarrow import csv
from tiny_use import Done

from compress.data.columns import Column
from compress.inspection.activation_clipping import ActivationRange, activation_ranges, record_activations
from compress.plugins.monitoring.drift import judged
from compress.plugins.monitoring.features import image_features, sound_features, text_features
from compress.plugins.monitoring.record import DriftTest
from compress.plugins.nightly import entry_run
from compress.plugins.nightly.record import EntryOutcome
from compress.plugins.nightly.suite import SuiteEntry
from compress.recipe.loading import read_recipe
from compress.recipe.policy import Policy
from compress.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Run = Callable[..., Done]


def write(path: Path, texts: Sequence[str]) -> Path:
    """Write a CSV file of recent inputs."""
    csv.write_csv(pa.table({"text": list(texts)}), path)
    return path


def looks_of(done: Done) -> dict[str, dict[str, Any]]:
    """Return the tests of a drift report by name."""
    return {look["name"]: look for look in json.loads(done.stdout)["tests"]}


def test_share_and_peaks_of_clipped_activations() -> None:
    # uint8 with scale 0.5 and zero point 10 covers -5 to 122.5; values up to half a step beyond round into the range.
    constants = {"scale": np.float32(0.5), "zero": np.uint8(10)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantizer"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="back"),
    ]
    graph = onnx_model(nodes, {"x": [1, 4]}, {"y": [1, 4]}, constants, opset=21)
    stored_range = ActivationRange("x", "layer", -5.0, 122.5, 0.5)

    rows = [{"x": np.float32([[-5.2, 0, 122.7, 1]])}, {"x": np.float32([[-5.3, 300, 122.8, 1]])}]
    seen = record_activations(graph, [stored_range], rows)

    assert seen.cut.tolist() == [[0.0], [0.75]]
    assert seen.peaks.tolist() == [[pytest.approx(122.7)], [300.0]]
    # Ranges of a ReLU and of a ReLU6.
    relu, relu6 = ActivationRange("x", "layer", 0.0, 100.0, 0.5), ActivationRange("x", "layer", 0.0, 6.0, 0.5)
    assert record_activations(graph, [relu, relu6], rows).cut.tolist() == [[0.25, 0.0], [0.5, 0.0]]


def test_activation_ranges_equal_quantizers_of_the_graph(run_folder: Path) -> None:
    file = run_folder / "model" / "onnx" / "model_quantized.onnx"
    graph = onnx.load(file)
    stored = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.graph.initializer}
    quantizers = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    ranges = {activation.tensor: activation for activation in activation_ranges(file)}

    assert set(ranges) == {node.input[0] for node in quantizers}
    for node in quantizers:
        scale, zero = (stored[name] for name in node.input[1:3])
        input_range = ranges[node.input[0]]
        assert (input_range.low, input_range.high) == (
            pytest.approx(-float(zero) * scale),
            pytest.approx((255 - float(zero)) * scale),
        )
        assert input_range.layer


def test_text_features_of_known_texts() -> None:
    tokenizer = tiny.word_piece()
    table = pa.table({"text": ["the film was great", "xq the", "\u2603 the film was a great plot"]})
    features = text_features(table, [Column("text")], tokenizer, max_length=6)

    assert features.lengths.tolist() == [6, 2 + len(tokenizer.tokenize("xq the")), 9]
    # Of six positions two are special tokens, so that three of the last text's seven tokens are cut.
    assert features.cut[[0, 2]].tolist() == [0.0, pytest.approx(3 / 7)]
    assert features.broken.tolist() == [0.0, 0.5, 0.0]
    assert features.words[1] == {"xq"}
    assert features.unknown is not None
    assert features.unknown.tolist() == [0.0, 0.0, pytest.approx(1 / 7)]
    assert features.tokens[1].sum() == min(4, len(tokenizer.tokenize("xq the")))


def test_image_features_of_a_known_image() -> None:
    image = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    image.fromarray(np.repeat(np.uint8([[0, 255]]), 3, axis=0)).save(content, "png")
    value = {"bytes": content.getvalue(), "path": None, "sha256": ""}
    features = image_features(pa.table({"image": [value]}), Column("image", kind="image"))
    assert {name: values.tolist() for name, values in features.items()} == {
        "brightness": [0.5],
        "contrast": [0.5],
        "size": [3.0],
    }


def test_audio_features_of_a_known_recording() -> None:
    soundfile = pytest.importorskip("soundfile")
    content = io.BytesIO()
    soundfile.write(content, np.tile([0.5, -0.5, 0.5, -1.0], 100), 8000, format="WAV", subtype="FLOAT")
    value = {"bytes": content.getvalue(), "path": None, "sha256": ""}
    features = sound_features(pa.table({"audio": [value]}), Column("audio", kind="audio"))
    # A quarter of the samples have a power of 1, the others of 1/4.
    expected = {"loudness": 10 * np.log10(0.25 + 0.75 / 4), "seconds": 0.05, "rate": 8000.0, "clipped": 0.25}
    assert {name: values.tolist() for name, values in features.items()} == {
        name: [pytest.approx(feature)] for name, feature in expected.items()
    }


def test_shifted_inputs_drift_and_equal_source_does_not(run_folder: Path, tmp_path: Path, compress: Run) -> None:
    same = write(tmp_path / "same.csv", tiny.texts(150, seed=9))
    quiet = compress("drift", run_folder, "--recent", same, "--json")
    assert (quiet.code, json.loads(quiet.stdout)["reference"]["name"]) == (0, "the test rows of tiny"), quiet.stdout
    assert {look["verdict"] for look in looks_of(quiet).values()} == {"none"}

    strange = [f"{text} zyx wvu zzz qqq xxyyzz" for text in tiny.texts(150, seed=9)]
    page = tmp_path / "drift.html"
    loud = compress("drift", run_folder, "--recent", write(tmp_path / "today.csv", strange), "--html", page)
    assert loud.code == 1
    assert "words outside the table:\n  qqq: 0% \u2192 100%" in loud.stdout
    assert "use_unlabeled: true` and `min_count` to 1 (now 3) of `stages.1.trim_vocabulary`" in " ".join(
        loud.stdout.split()
    )
    assert "raise `data.max_length` (now 16)" in " ".join(loud.stdout.split())
    html = page.read_text()
    assert html.count('class="chart"') >= 4
    assert "widen the table: put today" in html


def test_clipped_activations_name_layer_and_stage(run_folder: Path, tmp_path: Path, compress: Run) -> None:
    # No calibration row was a text of one repeated word.
    texts = [" ".join([word] * 11) for word in (*tiny.GOOD, *tiny.BAD) for _ in range(10)]
    looks = looks_of(compress("drift", run_folder, "--recent", write(tmp_path / "today.csv", texts), "--json"))
    ranges = looks["ranges"]
    assert ranges["verdict"] == "drift"
    assert "`stages.3.onnx_int8` draws its 48 `calibration_examples`" in ranges["advice"]
    worst = ranges["parts"][0]
    assert worst["recent"] > worst["reference"]
    assert "8 bits stand for" in worst["note"]
    assert looks["unknown"]["verdict"] == "none"


def test_training_rows_are_no_reference_for_confidence(run_folder: Path, tmp_path: Path, compress: Run) -> None:
    same = write(tmp_path / "same.csv", tiny.texts(150, seed=9))
    done = compress("drift", run_folder, "--recent", same, "--reference", run_folder / "train.csv", "--json")
    looks = looks_of(done)
    assert done.code == 0
    assert {name for name, look in looks.items() if look["verdict"] == "not judged"} == {
        "unknown", "words", "confidence",
    }  # fmt: skip
    assert "trained on" in json.loads(done.stdout)["notes"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\n" + "a film\n" * 30, "today.csv has no column 'text'"),
        ("text\n" + "a film\n" * 4, "There are 4 rows to look at."),
        ("text\n", "a header and no rows"),
        (None, "does not exist"),
    ],
)
def test_bad_input_is_refused(
    run_folder: Path, tmp_path: Path, compress: Run, content: str | None, message: str
) -> None:
    path = tmp_path / "today.csv"
    if content is not None:
        path.write_text(content)
    done = compress("drift", run_folder, "--recent", path)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nightly_run_reports_input_drift(
    run_folder: Path, tmp_path: Path, compress: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "latest").symlink_to(run_folder)
    write(tmp_path / "today.csv", [f"{text} zyx wvu" for text in tiny.texts(80, seed=9)])

    def here(command: list[str], output: Path, log: Path, *limits: float) -> entry_run.EndedProcess:
        done = compress(*command[3:])
        output.write_text(done.stdout)
        log.write_text(done.stderr)
        return entry_run.EndedProcess(done.code, 0.1, False)

    monkeypatch.setattr(entry_run, "run_process", here)
    passed = entry_run.EntryResult(EntryOutcome(entry="tiny", status="passed"))

    def night(recent: str) -> entry_run.EntryResult:
        entry = entry_run.EntryRun(SuiteEntry(recipe="tiny.yaml", recent=recent), tmp_path, tmp_path, None, Policy())
        return entry.check_drift(passed, read_recipe(run_folder / "recipe.yaml"), tmp_path, 60.0)

    todays_night = night("today.csv")
    assert todays_night.outcome.status == "missed"
    assert {finding.metric for finding in todays_night.findings} >= {"use_words", "use_tokens"}
    assert "drift of use, words outside the table: widen the table" in todays_night.findings[0].sentence
    gone = night("gone.csv")
    assert (gone.outcome.status, gone.findings[0].kind) == ("failed", "stage")
    assert "gone.csv does not exist" in gone.findings[0].what


def recipe(*stages: Any, **data: Any) -> Recipe:
    """Return a recipe with these stages and data fields."""
    values = {"name": "r", "task": "text-classification", "model": "model", "stages": list(stages)}
    return Recipe.model_validate(values | {"data": {"splits": {"train": "a.csv", "test": "b.csv"}, **data}})


def look(name: str, p_value: float, effect: float = 1.0, matters_from: float = 0.1) -> DriftTest:
    """Return a drift test with a p-value and an effect."""
    return DriftTest(name=name, title=name, verdict="none", effect=effect, matters_from=matters_from, p_value=p_value)


def test_verdicts_need_a_corrected_p_value_and_an_effect_that_matters() -> None:
    looks = [look("length", 0.003), look("cut", 0.001), look("classes", 0.0001, effect=0.05), look("words", 0.5)]
    verdicts = {
        judgement.name: judgement
        for judgement in judged(looks, 0.005, recipe({"distill": {"student": {"layers": [0]}}}))
    }
    assert {name: judgement.verdict for name, judgement in verdicts.items()} == {
        "length": "none", "cut": "drift", "classes": "small", "words": "none",
    }  # fmt: skip
    # Holm's correction doubles the third smallest of four p-values.
    assert verdicts["length"].adjusted == pytest.approx(0.006)
