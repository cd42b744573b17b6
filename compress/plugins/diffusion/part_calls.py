"""What one call of each part of a pipeline costs, predicted from its config alone. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path

from compress.inspection.budget import PartCall
from compress.models.json_file import read_json
from compress.models.pipeline_folder import UNET, is_pipeline
from compress.utils.errors import ModelError

_PARTS = (UNET, "vae", "vae_decoder")


def part_calls(folder: Path) -> tuple[PartCall, ...]:
    """Of the parts that diffusers makes of their configs; whatever their weights are stored in.

    Raises `ModelError` for a model that is no pipeline, and for a denoiser whose cost is not predicted.
    """
    if not is_pipeline(folder):
        raise ModelError(
            "What a call costs is predicted for the parts of a pipeline.",
            where=str(folder),
            expected="a folder in diffusers' layout, with model_index.json",
            hint="measure it: compress bench, or compress profile",
        )
    from compress.plugins.diffusion.component_costs import part_costs

    files = {name: path for name in _PARTS if (path := folder / name / "config.json").is_file()}
    configs = {name: read_json(path) for name, path in files.items()}
    side = configs.get(UNET, {}).get("sample_size")
    found = []
    for name, config in configs.items():
        costs = part_costs(config, size=side if isinstance(side, int) else None)
        found.append(
            PartCall(
                part=name,
                parameters=costs.parameters,
                multiplications=costs.multiplications,
                fp32_bytes=costs.memory_bytes(32),
                fp16_bytes=costs.memory_bytes(16),
                fp32_stored_attention_bytes=costs.memory_bytes(32, stored_attention=True),
            )
        )
    return tuple(found)
