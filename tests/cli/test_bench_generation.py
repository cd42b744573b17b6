"""`compress bench ARTIFACT --context N`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_run
from decoder_graphs import TinyDecoder
from onnx_graphs import write_classifier

from compress.cli import main


def test_two_decoders_are_timed_without_a_recipe(tmp_path: Path) -> None:
    TinyDecoder().write(tmp_path / "small")
    TinyDecoder(width=32).write(tmp_path / "large")
    artifacts = ("small", "--baseline", "large/onnx/model.onnx")
    lengths = ("--context", "8", "--context", "16", "--tokens", "3")
    done = tiny_run.compress(
        "bench", *artifacts, *lengths, "--threads", "1", "--budget", "3", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(row["model"], row["metric"]): row for row in found["measurements"]}
    for model in ("baseline", "artifact"):
        for context in (8, 16):
            row = rows[model, f"time_per_output_token_ms_context_{context}"]
            assert len(row["raw"]) == 3 * found["environment"]["rounds"][f"context_{context}"]
    assert rows["baseline", "speedup_time_to_first_token_context_8"]["value"] == 1.0
    assert found["environment"]["tokens"] == 3
    assert any("drawn at random" in note for note in found["notes"])


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
def test_bad_input_is_said_in_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    write_classifier(tmp_path / "classifier", 8, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", "bench", "classifier", *options])
    with pytest.raises(SystemExit) as end:
        main()
    stdout, stderr = capsys.readouterr()
    assert (end.value.code, stdout) == (2, ""), stderr
    # A usage error is boxed by lines.
    assert message in " ".join(stderr.replace("│", " ").split())
    assert "Traceback" not in stderr
