from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, and what looks like an exported model until it is opened."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_all(folder)
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "model.onnx").write_bytes(b"no graph")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "There is no model in 'nowhere'"),
        (("model",), "Nothing says which task"),
        (("model", "--recipe", "tiny.yaml", "--target", "moon"), "There is no target 'moon'"),
        (("model", "--recipe", "tiny.yaml", "--target", "gpu"), "The target 'gpu' cannot be profiled"),
        (("model", "--recipe", "tiny.yaml", "--html", "no/such/page.html"), "The page cannot be written there"),
        (("model", "--recipe", "tiny.yaml", "--html", "."), "The page cannot be written there"),
        (("model", "--recipe", "tiny.yaml", "--threads", "0"), "--threads"),
        (("model", "--recipe", "tiny.yaml", "--batch-size", "0"), "--batch-size"),
        (("model", "--recipe", "tiny.yaml"), "cannot open the graph"),
    ],
)
def test_bad_input_is_told_in_words(place: Path, arguments: tuple[str, ...], said: str) -> None:
    done = tiny_run.compress("profile", *arguments, "--json", folder=place)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
