"""The table of what compressed pictures must keep: figures, bounds, and the runs that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion import Row, levels_apart, models, of_int8, of_steps, of_the_run, points_lost, row, runs_beside
from picture_reports import picture_report

from compress.plugins.diffusion.stage_settings import StepDistillation
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL, Report

RECIPE = Path(__file__).parents[3] / "recipes" / "fashion-diffusion.yaml"


def report(**speeds: float) -> Report:
    """Distances of 3.1 and 3.8, 188 and 184 prompts of 200 kept, 1.5 MB and 120 kB; with what is said of speed."""
    run_report = picture_report()
    rows = [
        Measurement(
            model=FINAL, metric=metric, target="cpu", value=value, unit="x", low=0.9 * value, high=1.1 * value, n=6
        )
        for metric, value in speeds.items()
    ]
    return run_report.model_copy(update={"measurements": (*run_report.measurements, *rows)})


@pytest.mark.parametrize(
    ("value", "lower", "held"),
    [(41, False, "aim"), (40, False, "aim"), (39, False, "yes"), (20, False, "yes"), (19.9, False, "no"),
     (1.1, True, "aim"), (1.2, True, "yes"), (1.31, True, "no")],
)  # fmt: skip
def test_a_figure_holds_the_best_bound_that_it_keeps(value: float, lower: bool, held: str) -> None:
    least, aim = (1.3, 1.1) if lower else (20, 40)
    assert row("what", value, "so much", least, aim, "{:g}x", lower).held == held
    assert row("what", value, "so much", least, None, "{:g}x", lower).held == ("no" if held == "no" else "yes")


def test_the_run_is_held_against_its_baseline() -> None:
    faster, smaller, farther, lost = of_the_run(report(speedup=37.0))
    assert faster == Row("end to end against the fp32 start, faster", "37.0x (33.3\u201340.7x)", "20x", "40x", "yes")
    # 50 times 30,000 bytes to 4 times as many.
    assert smaller.found.startswith("12.5x (1.50 MB to 120 kB)") and smaller.held == "aim"
    assert farther.found.startswith("1.23x (3.80 (3.60") and farther.held == "yes"
    # 188 and 184 of 200, the same ones.
    assert lost.found.startswith("2.0 (") and lost.held == "yes"


def test_points_are_paired() -> None:
    def prompts(*seen: int) -> Measurement:
        raw = tuple(map(float, seen))
        return Measurement(
            model="m", metric="prompt_accuracy", target="cpu", value=0.5, unit="ratio", n=len(raw), raw=raw
        )

    lost, low, high = points_lost(prompts(1, 1, 1, 0), prompts(1, 0, 0, 1))
    # Two are lost and one is found, of four.
    assert lost == pytest.approx(25.0)
    assert low < lost < high
    assert points_lost(prompts(1, 0), prompts(1, 0))[0] == 0.0


def test_integers_and_training_are_judged_by_their_own_runs() -> None:
    distance, faster = of_int8(report(speedup_denoiser_step=1.7))
    assert (distance.held, faster.held) == ("no", "yes")
    scheduler, taught = (report(perceptual_distance_to_baseline=apart) for apart in (0.2, 0.05))
    from_real, from_the_start = of_steps(scheduler, taught)
    assert from_real.found.startswith("1.00x") and from_real.held == "no"
    assert from_the_start.found.startswith("0.250x") and from_the_start.held == "yes"


def test_each_model_has_a_row_from_the_run_that_has_it() -> None:
    run_report = report()
    rows = list(models(run_report, dict.fromkeys(("int8", "scheduler", "distilled"), run_report)))
    assert [cells[0] for cells in rows] == [
        *("the start, fp32", "its denoiser in INT8", "best scheduler, as few steps", "distilled", "all of it")
    ]
    start = run_report.find(BASELINE, "latency_ms", "cpu")
    assert start is not None and rows[0][5].startswith(f"{start.value:g} ms")
    assert rows[0][6] == ""


def test_runs_beside_have_the_recipes_own_fields() -> None:
    recipe = read_recipe(RECIPE)
    beside = runs_beside(recipe)
    (unet_stage,) = (stage for stage in recipe.stages if getattr(stage, "part", "") == "unet")
    assert beside["int8"][1] == unet_stage.model_dump()
    steps = next(stage.steps for stage in recipe.stages if isinstance(stage, StepDistillation))
    assert beside["scheduler"] == [{"kind": "schedule", "steps": steps, "scheduler": "best"}]
    assert beside["distilled"][-1]["kind"] == "distill_steps"
    for stages in beside.values():
        changed: dict[str, Any] = {"name": "beside", "stages": stages, "limits": []}
        assert Recipe.model_validate({**recipe.model_dump(), **changed}).baseline == "start"


def test_levels_are_of_255() -> None:
    ours = np.zeros((1, 2, 2, 1), np.float32)
    theirs = np.array([[[0.0, 0.0039], [0.0, 0.0098]]], np.float32)
    assert levels_apart(ours, theirs) == 2.0
