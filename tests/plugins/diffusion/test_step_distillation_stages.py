"""The stages that change how many steps a model draws in, on a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_images
import tiny_pipelines
import torch

from compress.data.dataset import Dataset
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.schedule_stage import Schedule
from compress.plugins.diffusion.stages import DistillConsistency, DistillSteps
from compress.plugins.diffusion.torch_session import torch_sampler
from compress.stages.base import Context
from compress.tasks.registry import get_task
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

pytest.importorskip("diffusers")
TASK = get_task("text-to-image")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    pictures = tiny_images.table(8)
    captions = [f"a {'dark' if row % 2 else 'small'} coat" for row in range(8)]
    rows = pa.table({"image": pictures["image"], "text": captions})

    def none(label: str) -> Any:
        raise AssertionError(label)

    data = Dataset(TASK.columns, {"train": rows, "test": rows}, ())
    return Context(TASK, data, 12, 0, SilentProgress(), none, Path, tmp_path / "scratch")


@pytest.fixture
def model(tmp_path: Path) -> GeneratorModel:
    return load_pipeline(tiny_pipelines.pipeline_folder(tmp_path / "start"))


def drawn(model: GeneratorModel) -> np.ndarray:
    noise = np.stack([model.processor.noise(seed) for seed in range(2)])
    return torch_sampler(model).draw(model.processor.ids(["a coat", "a bag"]), noise, [0, 1])


def same_when_read_again(model: GeneratorModel, folder: Path) -> None:
    folder.mkdir()
    model.save(folder)
    np.testing.assert_array_equal(drawn(load_pipeline(folder)), drawn(model))


def test_a_scheduler_is_changed_with_the_number_of_steps(
    model: GeneratorModel, context: Context, tmp_path: Path
) -> None:
    stage = Schedule(
        scheduler="DPMSolverMultistepScheduler", steps=5, guidance=2, config={"timestep_spacing": "trailing"}
    )
    weights_before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    rescheduled = stage.run(model, context)
    assert isinstance(rescheduled, GeneratorModel) and not stage.output_spec().changes_weights
    assert all(torch.equal(weight, weights_before[name]) for name, weight in rescheduled.module.state_dict().items())
    assert type(rescheduled.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (rescheduled.sampling.steps, rescheduled.sampling.guidance) == (5, 2)
    same_when_read_again(rescheduled, tmp_path / "made")
    assert np.abs(drawn(rescheduled) - drawn(model)).max() > 1e-3


def test_the_best_is_the_nearest_to_many_steps(model: GeneratorModel, context: Context) -> None:
    rescheduled = Schedule(scheduler="best", steps=4, reference_steps=20, prompts=2).run(model, context)
    assert isinstance(rescheduled, GeneratorModel)
    (table,) = context.tables
    distances = [row[1] for row in table.rows if isinstance(row[1], float)]
    assert len(distances) > 5 and distances == sorted(distances)
    assert str(table.rows[0][0]).startswith(type(rescheduled.scheduler).__name__)


def test_a_scheduler_that_does_not_fit_is_refused(model: GeneratorModel, context: Context) -> None:
    with pytest.raises(InputError, match="LCMScheduler does not fit"):
        Schedule(scheduler="LCMScheduler", steps=4).run(model, context)
    with pytest.raises(InputError, match="no scheduler 'DDIMSchedule'"):
        Schedule(scheduler="DDIMSchedule", steps=4).check_model(Path("start"))


@pytest.mark.parametrize(
    ("few", "scheduler", "guidance"),
    [
        ({"method": "progressive", "steps": 2, "teacher_steps": 4, "guidance": 3.0}, "DDIMScheduler", 1.0),
        ({"method": "consistency", "steps": 2, "guidance": (2.0, 5.0)}, "LCMScheduler", 2.0),
    ],
)
def test_fewer_steps_are_learned_and_written(
    model: GeneratorModel, context: Context, tmp_path: Path, few: dict[str, Any], scheduler: str, guidance: float
) -> None:
    weights_before = {name: weight.clone() for name, weight in model.parts["unet"].state_dict().items()}
    fields = {name: value for name, value in few.items() if name != "method"}
    kind = DistillConsistency if few["method"] == "consistency" else DistillSteps
    stage = kind.model_validate({**fields, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3})
    distilled = stage.run(model, context)
    assert isinstance(distilled, GeneratorModel) and type(distilled.scheduler).__name__ == scheduler
    assert (distilled.sampling.steps, distilled.sampling.guidance) == (2, guidance)
    after = distilled.parts["unet"].state_dict()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert any(not torch.equal(weights_before[name], after[name]) for name in weights_before)
    assert ("time_embedding.cond_proj.weight" in after) == (few["method"] == "consistency")
    same_when_read_again(distilled, tmp_path / "made")
    assert any("trained" in str(row[0]) for row in context.tables[0].rows)
