"""A sentence encoder's bundle: embeddings as the model's folder says, in the manifest, the example and the snippets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_bundles import EMBEDDINGS, WIDTH, wanted_of, write_encoder_run

from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.postprocess import Embed
from compress.plugins.apps.verify import verify
from compress.utils.errors import ModelError
from compress.utils.progress import SilentProgress

QUESTION, NEAR, FAR = "the lovely film", "the film was lovely", "awful plots!"
IDS = {QUESTION: [2, 4, 9, 5, 3], NEAR: [2, 4, 5, 6, 9, 3], FAR: [2, 11, 10, 12, 13, 3]}
POOLED = {
    "mean": lambda rows: rows.sum(axis=0) / len(rows),
    "max": lambda rows: np.maximum.reduce(rows),
    "cls": lambda rows: rows[0] + 0.0,
    "lasttoken": lambda rows: rows[len(rows) - 1],
}


def closed_form(text: str, pooling: str, normalize: bool = True) -> np.ndarray:
    pooled: np.ndarray = POOLED[pooling](EMBEDDINGS[IDS[text]])  # type: ignore[no-untyped-call]
    return pooled / np.sqrt((pooled * pooled).sum()) if normalize else pooled


def embedded(folder: Path, text: str) -> np.ndarray:
    """By the bundle's own example."""
    program = (
        f"import json, sys; sys.path.insert(0, {str(folder / 'examples')!r}); import run; "
        f"print(json.dumps(run.Encoder().embed({text!r}).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize(("pooling", "normalize"), [("max", True), ("cls", False), ("lasttoken", True)])
def test_each_pooling_is_what_the_folder_says(tmp_path: Path, pooling: str, normalize: bool) -> None:
    modules = SentenceModules(WIDTH, (pooling,), (Normalize(),) if normalize else ())
    run = write_encoder_run(tmp_path / "run", modules)
    bundle = build(wanted_of(run, samples=tuple(IDS)), tmp_path / "out", SilentProgress())
    assert bundle.manifest.postprocessing == Embed(
        output="last_hidden_state", pooling=pooling, normalize=normalize, dimensions=WIDTH
    )
    for case in json.loads((bundle.folder / "selftest.json").read_text())["cases"]:
        assert case["input_ids"] == IDS[case["text"]]
        np.testing.assert_allclose(case["embedding"], closed_form(case["text"], pooling, normalize), atol=1e-6)
    np.testing.assert_allclose(embedded(bundle.folder, NEAR), closed_form(NEAR, pooling, normalize), atol=1e-6)
    assert verify(bundle.archive).worst < 0.01


def test_a_graph_that_pools_is_left_to_it(tmp_path: Path) -> None:
    run = write_encoder_run(tmp_path / "run", SentenceModules(WIDTH, ("cls",)), pooled=True)
    bundle = build(wanted_of(run, samples=tuple(IDS)), tmp_path / "out", SilentProgress())
    end = bundle.manifest.postprocessing
    assert isinstance(end, Embed)
    assert (end.output, end.pooling, end.normalize) == ("sentence_embedding", None, False)
    np.testing.assert_allclose(embedded(bundle.folder, FAR), closed_form(FAR, "cls", normalize=False), atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (SentenceModules(WIDTH, ("mean", "max")), "pooling by max and mean"),
        (SentenceModules(WIDTH, ("weightedmean",)), "pooling by weightedmean"),
        (SentenceModules(WIDTH, steps=(Dense(np.eye(WIDTH, dtype=np.float32)[:8]),)), "pooling by mean, Dense"),
    ],
)
def test_what_an_app_would_have_to_compute_is_refused(tmp_path: Path, modules: SentenceModules, expected: str) -> None:
    run = write_encoder_run(tmp_path / "run", modules)
    with pytest.raises(ModelError, match=rf"(?s){expected}\..*sentence_embedding: true"):
        build(wanted_of(run), tmp_path / "out", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_does_not_say_is_refused(tmp_path: Path) -> None:
    run = write_encoder_run(tmp_path / "run", SentenceModules(WIDTH))
    (run / "model" / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"There is no modules\.json"):
        build(wanted_of(run), tmp_path / "out", SilentProgress())


def test_the_example_finds_the_nearest_as_the_formula_does(bundles: dict[str, Bundle]) -> None:
    command = [sys.executable, str(bundles["sentence"].folder / "examples" / "run.py")]
    output = subprocess.run([*command, QUESTION, FAR, NEAR], capture_output=True, text=True, check=True).stdout
    cosines = {text: closed_form(QUESTION, "mean") @ closed_form(text, "mean") for text in (FAR, NEAR)}
    assert cosines[NEAR] > cosines[FAR]
    assert output == "".join(f"{cosines[text]:6.3f}  {text}\n" for text in (NEAR, FAR))
    passed = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=True).stdout
    assert passed.startswith("passed")


def test_the_card_says_what_an_embedding_is(bundles: dict[str, Bundle]) -> None:
    card = (bundles["sentence"].folder / "README.md").read_text()
    assert "pipeline_tag: feature-extraction\n" in card
    assert f"an embedding of {WIDTH} values: the mean of its tokens' vectors, brought to length 1." in card
