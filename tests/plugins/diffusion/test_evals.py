"""Pictures that a classifier judges: rows of all models, slices, pictures, paths; a judge of other classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_diffusion_runs import ROWS, write_recipe
from tiny_pipelines import WORDS, pipeline_folder
from tiny_run import load
from transformers import RegNetConfig, RegNetForImageClassification

from compress.formats.targets import REFERENCE
from compress.pipeline.measurements import Findings, measure_answers
from compress.pipeline.run_checks import check_run
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import TargetSession
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
KINDS = tuple(WORDS[3:5])


def _judge(folder: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(1)
    config = RegNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 2], depths=[1, 1], groups_width=2, layer_type="x",
        id2label=dict(enumerate(names)), label2id={name: class_id for class_id, name in enumerate(names)},
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


def _road(folder: Path, names: tuple[str, ...]) -> StageRunner:
    folder.mkdir(exist_ok=True)
    options = {"judge": _judge(folder / "judge", names).name, "pictures": 2}
    slices = [{"column": "label", "min_rows": 1}]
    recipe = load(write_recipe(folder, stages=[{"onnx": {}}], slices=slices, evaluation=options, targets=["torch"]))
    return StageRunner(recipe, folder, folder / "artifacts", SilentProgress())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Of a pipeline, the same again, and one of other weights in fewer steps."""
    folder = tmp_path_factory.mktemp("judged")
    runner = _road(folder, KINDS)
    other = pipeline_folder(folder / "other", seed=3)
    (other / "sampling_config.json").write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')
    artifacts = {BASELINE: runner.inputs.start, "same": runner.inputs.start, FINAL: runner.inputs.resolve(str(other))}
    findings = Findings()
    measure_answers(findings, TargetSession(runner, REFERENCE, artifacts))
    return findings


def _row(found: Findings, model: str, metric: str) -> Measurement:
    (row,) = (candidate for candidate in found.measurements if (candidate.model, candidate.metric) == (model, metric))
    return row


def test_every_model_is_judged_on_every_row(found: Findings) -> None:
    for label in (BASELINE, "same", FINAL):
        seen, distance = (_row(found, label, metric) for metric in ("prompt_accuracy", "frechet_distance"))
        assert seen.n == distance.n == ROWS["test"] and seen.raw is not None and distance.raw is not None
        parts = [_row(found, label, f"prompt_accuracy[label={kind}]") for kind in KINDS]
        assert sum(part.n for part in parts) == ROWS["test"]
        assert sum(part.value * part.n for part in parts) == pytest.approx(sum(seen.raw))
        assert _row(found, label, "picture_recall").n == ROWS["test"]
    far = _row(found, FINAL, "perceptual_distance_to_baseline").value
    assert _row(found, "same", "perceptual_distance_to_baseline").value < 1e-9 < far
    assert [_row(found, label, "sampling_steps").value for label in (BASELINE, FINAL)] == [3, 2]
    near, apart = (_row(found, label, "ssim_to_baseline").value for label in ("same", FINAL))
    assert near == pytest.approx(1) and apart < 0.99


def test_the_first_rows_are_shown_as_every_model_draws_them(found: Findings) -> None:
    shown = {(picture.model, picture.seed): picture for picture in found.pictures}
    assert set(shown) == {(model, seed) for model in (BASELINE, "same", FINAL) for seed in (0, 1)}
    assert shown[("same", 0)].png == shown[(BASELINE, 0)].png != shown[(FINAL, 0)].png
    assert shown[(BASELINE, 0)].difference is None and shown[("same", 0)].levels == 0
    assert (shown[(FINAL, 1)].levels or 0) > 0 and shown[(FINAL, 1)].difference


def test_paths_are_followed_from_the_same_noise(found: Findings) -> None:
    same, final = found.drift
    assert (same.model, same.steps, len(same.times)) == ("same", 3, 4)
    assert max(same.typical) == 0 and same.parted is None
    assert (final.model, final.steps, final.times[-1]) == (FINAL, 2, -1)
    assert final.typical[-1] > 0.1 and final.parted is not None


def test_a_judge_of_other_classes_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knows no class"):
        check_run(_road(tmp_path / "other", ("hat", "glove")))
