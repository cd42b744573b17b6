"""A run whose pictures a classifier judges: rows of all models, slices, pictures, paths; a judge of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs_of_pictures import ROWS, write_recipe
from tiny_pipelines import WORDS
from tiny_run import BENCHMARK, Notes, load
from transformers import RegNetConfig, RegNetForImageClassification

from compress.errors import InputError
from compress.pipeline.run import Run, run
from compress.report.schema import BASELINE, FINAL

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
KINDS = tuple(WORDS[3:5])


def _judge(folder: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(1)
    config = RegNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 2], depths=[1, 1], groups_width=2, layer_type="x",
        id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    RegNetForImageClassification(config).save_pretrained(folder)
    prepared = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder


def _recipe(folder: Path, names: tuple[str, ...] = KINDS, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    judge = _judge(folder / "judge", names)
    slices = [{"column": "label", "min_rows": 1}]
    wanted: dict[str, Any] = {"stages": [{"export": {}}, {"quantize": {"part": "unet"}}], "slices": slices}
    wanted["benchmark"] = {**BENCHMARK, "every_stage": True}
    wanted["evaluation"] = {"judge": judge.name, "pictures": 2}
    return write_recipe(folder, **{**wanted, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("judged")
    return run(load(_recipe(folder)), folder, folder / "artifacts", Notes())


def test_every_model_is_judged_on_every_row(done: Run) -> None:
    for label in (BASELINE, "export", FINAL):
        seen = done.report.find(label, "prompt_accuracy", "cpu")
        distance = done.report.find(label, "frechet_distance", "cpu")
        assert seen is not None and distance is not None
        assert seen.n == distance.n == ROWS["test"] and seen.raw is not None and distance.raw is not None
        assert done.report.find(label, "picture_recall", "cpu") is not None
        parts = [done.report.find(label, f"prompt_accuracy[label={kind}]", "cpu") for kind in KINDS]
        assert sum(part.n for part in parts if part is not None) == ROWS["test"]
    near = done.report.find(BASELINE, "perceptual_distance_to_baseline", "cpu")
    far = done.report.find(FINAL, "perceptual_distance_to_baseline", "cpu")
    assert near is not None and far is not None and abs(near.value) < 1e-9 < far.value


def test_the_first_rows_are_shown_as_every_model_draws_them(done: Run) -> None:
    shown = {(one.model, one.seed): one for one in done.report.pictures}
    assert {seed for _, seed in shown} == {0, 1} and {model for model, _ in shown} == set(done.report.models)
    assert shown[(FINAL, 0)].png == shown[("quantize", 0)].png != shown[(BASELINE, 0)].png
    assert shown[(BASELINE, 0)].difference is None and (shown[(FINAL, 0)].levels or 0) > 0
    # Equal to rounding, or a level off here and there.
    assert (shown[("export", 0)].levels or 0) < 0.1


def test_paths_are_followed_from_the_same_noise(done: Run) -> None:
    found = {one.model: one for one in done.report.drift}
    assert set(found) == set(done.report.models) - {BASELINE}
    assert found[FINAL].steps == 3 and len(found[FINAL].times) == 4 and found[FINAL].times[-1] == -1
    assert found[FINAL].typical[0] == 0 < found[FINAL].typical[-1]
    assert max(found["export"].typical) < 1e-3
    page = (done.folder / "report.html").read_text()
    assert "What they draw" in page and "Where their paths part" in page


def test_a_judge_of_other_classes_is_refused(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path / "other", names=("hat", "glove"), stages=[{"export": {}}])
    with pytest.raises(InputError, match="knows no class"):
        run(load(recipe), tmp_path / "other", tmp_path / "artifacts", Notes())
