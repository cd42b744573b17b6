"""What a call of a pipeline's parts costs, as `compress inspect --calls` shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pipelines
from rich.console import Console

from compress.inspection.budget import budget_of
from compress.inspection.budget_rendering import write_budget
from compress.plugins.diffusion.component_costs import costs_of
from compress.plugins.diffusion.part_calls import part_calls
from compress.plugins.diffusion.stage_settings import AutoencoderDistillation
from compress.plugins.diffusion.tiny_autoencoder import make_small_autoencoder
from compress.utils.errors import ModelError


def test_parts_of_a_pipeline_are_predicted_and_shown(tmp_path: Path) -> None:
    folder = tiny_pipelines.pipeline_folder(tmp_path / "pipeline")
    budget = budget_of(folder, calls=True)
    assert budget.calls is not None
    unet, vae = budget.calls
    parts = tiny_pipelines.parts()
    for call in (unet, vae):
        assert call.parameters == sum(weight.numel() for weight in parts[call.part].parameters())
        assert call.fp32_bytes == 2 * call.fp16_bytes > 4 * call.parameters
        assert call.fp32_stored_attention_bytes >= call.fp32_bytes
    # A small decoder's config has no size of its own, and is asked about the same latents.
    small = make_small_autoencoder(parts["vae"], AutoencoderDistillation(width=8, layers=1), seed=0)
    small.save_pretrained(tmp_path / "small")
    (folder / "vae" / "config.json").write_bytes((tmp_path / "small" / "config.json").read_bytes())
    assert part_calls(folder)[1].multiplications == costs_of(small, 8).multiplications < vae.multiplications
    console = Console(width=120, record=True)
    write_budget(budget, 1, 0, console)
    shown = console.export_text()
    assert "one call of" in shown and "vae" in shown


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="parts of a pipeline"):
        part_calls(tmp_path)
