"""`compress doctor` of a model of two graphs: a tiny Whisper in INT8, alone and against its float graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tiny_speech import TASK, write_speech
from typer.testing import CliRunner

from compress.cli.doctor import doctor
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.model import quantized_name
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import InputError

ENCODER, DECODER = "encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`float/`, `int8/` and a recipe with recordings."""
    folder = tmp_path_factory.mktemp("place")
    recipe = {"name": "tiny", "task": TASK, "model": "model", "data": {"splits": write_speech(folder)}}
    recipe |= {"stages": ["onnx"], "benchmark": {"threads": 1}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    floats = export_encoder_decoder(Checkpoint(folder / "model"))
    graphs = {
        quantized_name(name): quantize_products(graph, per_channel=True, reduce_range=False)
        for name, graph in floats.graphs.items()
    }
    for name, model in {"float": floats, "int8": floats.with_graphs(graphs)}.items():
        (folder / name).mkdir()
        model.save(folder / name)
    return folder


def diagnose(*options: str) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(doctor)
    answer = CliRunner().invoke(app, [*options, "--json"])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    diagnosis: dict[str, Any] = json.loads(answer.stdout)
    return diagnosis


def test_products_in_branches_count(place: Path) -> None:
    """Six products in a layer of the encoder; in one of the decoder ten, two of them in a branch; and the head."""
    messages = [finding["what"] for finding in diagnose(str(place / "int8"), "--target", "x86-vnni")["findings"]]
    assert f"{ENCODER}: 12 of 14 operators with weights run as 8-bit integer kernels" in messages
    assert f"{DECODER}: 20 of 21 operators with weights run as 8-bit integer kernels" in messages


def test_saturation_is_looked_for_in_both_on_what_each_is_asked(place: Path) -> None:
    """Without a recipe it is what weights could do; with one, what they did, in the decoder's branches as well."""
    blind = diagnose(str(place / "int8"), "--target", "x86-avx2")["findings"]
    assert [finding for finding in blind if "name a recipe" in finding["what"]]
    assert [
        finding
        for finding in blind
        if finding["what"].startswith(f"{DECODER}: ") and "of 20 products" in finding["what"]
    ]
    findings = diagnose(str(place / "int8"), "--recipe", str(place / "tiny.yaml"), "--target", "x86-avx2")["findings"]
    messages = [finding["what"] for finding in findings if "saturat" in finding["what"]]
    assert {message.partition(":")[0] for message in messages} == {ENCODER, DECODER}
    assert not [message for message in messages if "name a recipe" in message]
    assert [message for message in messages if message.startswith(f"{DECODER}: ") and "on real inputs" in message]


@pytest.mark.slow
def test_each_graph_is_timed_against_its_float_graph(place: Path) -> None:
    options = ("--recipe", str(place / "tiny.yaml"), "--against", str(place / "float"), "--seconds", "0.1")
    diagnosis = diagnose(str(place / "int8"), *options)
    pairs = [
        (Path(difference["float_file"]).name, Path(difference["int8_file"]).name)
        for difference in diagnosis["differences"]
    ]
    assert pairs == [("encoder_model.onnx", ENCODER), ("decoder_model_merged.onnx", DECODER)]
    assert all(difference["layers"] and difference["int8_ms"] > 0 for difference in diagnosis["differences"])
    verdicts = [finding["what"] for finding in diagnosis["findings"] if "float: " in finding["what"]]
    assert [verdict.partition(":")[0] for verdict in verdicts] == [ENCODER, DECODER]
    with pytest.raises(InputError, match="1 graphs, and the model has 2"):
        diagnose(str(place / "int8"), *options[:3], str(place / "float" / "onnx" / "encoder_model.onnx"))
