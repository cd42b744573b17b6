"""Tests of `compress profile` and `compress bench --context`: results on tiny models, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_generation
import tiny_run
from decoder_graphs import TinyDecoder
from onnx_graphs import write_classifier
from quantized import quantize_tiny_llama

from compress.formats.onnx.decoder import export_decoder
from compress.models.checkpoint import Checkpoint

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Assert that a command failed with code 2 and ``message``; the lines of a usage error's box are removed first."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" or set(json.loads(done.stdout)) == {"error"}
    assert message in " ".join(done.stderr.replace("│", " ").split()) and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its data, and an exported model whose ONNX file is invalid."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_all(folder)
    shutil.copytree(folder / "model", folder / "exported")
    (folder / "exported" / "model.safetensors").unlink()
    (folder / "exported" / "model.onnx").write_bytes(b"no graph")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "There is no model in 'nowhere'"),
        (("exported",), "There is no recipe with the task"),
        (("exported", "--recipe", "tiny.yaml", "--target", "moon"), "There is no target 'moon'"),
        (("exported", "--recipe", "tiny.yaml", "--target", "gpu"), "The target 'gpu' cannot be profiled"),
        (("exported", "--recipe", "tiny.yaml", "--html", "no/such/page.html"), "The page cannot be written there"),
        (("exported", "--recipe", "tiny.yaml", "--html", "."), "The page cannot be written there"),
        (("exported", "--recipe", "tiny.yaml", "--threads", "0"), "--threads"),
        (("exported", "--recipe", "tiny.yaml", "--batch-size", "0"), "--batch-size"),
        (("exported", "--recipe", "tiny.yaml", "--phase", "prompt"), "No effect on text-classification: --phase"),
        (("exported", "--recipe", "tiny.yaml", "--phase", "batch"), "--phase"),
        (("exported", "--recipe", "tiny.yaml", "--target", "llama-cpp"), "llama-cpp does not open ONNX"),
        (("exported", "--recipe", "tiny.yaml"), "cannot open the graph"),
    ],
)
def test_profile_rejects_bad_input(
    here: Command, recipe_folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert_refused(here("profile", *arguments, "--json", folder=recipe_folder), message)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its text, and an exported quantized decoder in `made/`."""
    folder = tmp_path_factory.mktemp("decoder")
    tiny_generation.write_all(folder)
    quantized = quantize_tiny_llama(Checkpoint(folder / "model"), folder / "quantized")
    (folder / "made").mkdir()
    export_decoder(quantized).save(folder / "made")
    return folder


@pytest.mark.usefixtures("quick_limits")
@pytest.mark.parametrize(
    ("options", "phase", "context", "lengths"),
    [((), "token", 16, list(range(17, 33))), (("--phase", "prompt", "--context", "8"), "prompt", 8, [8] * 16)],
)
def test_decoder_profile_lists_operators_of_phase(
    here: Command, decoder: Path, options: tuple[str, ...], phase: str, context: int, lengths: list[int]
) -> None:
    """By default the recipe's context, 16 tokens, is profiled: tokens are generated at lengths 17 to 32."""
    arguments = ("profile", "made", "--recipe", "tiny.yaml", "--seconds", "0.1", "--json", *options)
    done = here(*arguments, folder=decoder)
    assert done.returncode == 0, done.stderr
    profile_json = json.loads(done.stdout)
    assert (profile_json["phase"], profile_json["context"], profile_json["lengths"]) == (phase, context, lengths)
    assert {"MatMulNBits", "GroupQueryAttention"} <= {row["name"] for row in profile_json["by_operator"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "2"), "No effect on text-generation: --batch-size"),
        (("--context", "192"), "has 192 tokens; a prompt of 192 needs 193"),
    ],
)
def test_decoder_profile_rejects_unsuitable_options(
    here: Command, decoder: Path, options: tuple[str, ...], message: str
) -> None:
    assert_refused(here("profile", "made", "--recipe", "tiny.yaml", *options, folder=decoder), message)


def test_bench_times_two_decoders_without_recipe(tmp_path: Path) -> None:
    TinyDecoder().write(tmp_path / "small")
    TinyDecoder(width=32).write(tmp_path / "large")
    artifacts = ("small", "--baseline", "large/onnx/model.onnx")
    lengths = ("--context", "8", "--context", "16", "--tokens", "3")
    done = tiny_run.compress(
        "bench", *artifacts, *lengths, "--threads", "1", "--budget", "3", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    profile_json = json.loads(done.stdout)
    rows = {(row["model"], row["metric"]): row for row in profile_json["measurements"]}
    for model in ("baseline", "artifact"):
        for context in (8, 16):
            row = rows[model, f"time_per_output_token_ms_context_{context}"]
            assert len(row["raw"]) == 3 * profile_json["environment"]["rounds"][f"context_{context}"]
    assert rows["baseline", "speedup_time_to_first_token_context_8"]["value"] == 1.0
    assert profile_json["environment"]["tokens"] == 3
    assert any("drawn at random" in note for note in profile_json["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "8", "--rate", "5"), "--rate and --context don't go together"),
        (("--context", "8", "--recipe", "r.yaml", "--batch-size", "2"), "--recipe, --batch-size and --context"),
        (("--tokens", "8"), "--tokens without --context"),
        (("--text", "t.txt", "--tokens", "8"), "--tokens, --text without --context"),
        (("--context", "0"), "greater than or equal to 1"),
        (("--context", "8", "--tokens", "0"), "greater than or equal to 1"),
        (("--context", "8", "--text", "t.txt"), "The text cannot be read"),
        (("--context", "8", "--target", "npu"), "There is no target 'npu'"),
        (("--context", "8"), "The graph cannot generate text: logits have the shape"),
        (("--context", "8", "--baseline", "nowhere"), "The artifact does not exist"),
    ],
)
def test_bench_rejects_bad_input(here: Command, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    write_classifier(tmp_path / "classifier", 8, 1)
    assert_refused(here("bench", "classifier", *options, folder=tmp_path), message)
