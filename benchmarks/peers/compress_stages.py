"""Stages of this project, measured as the peers are.

    PY peers/compress_stages.py ORDER.json ANSWER.json

ORDER has `model`, `data`, `samples`, `length`, `output`, `bits`, `group_size`, `threads`, and `stages`: the fields of
each, its `kind` among them, as a recipe has them. In ANSWER are `seconds` from before the weights are read until the
last checkpoint is written, the text's reading and tokenizing included, which the peers are spared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from language_setting import LanguageSetting
from quantizing import answer

from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint
from compress.stages.registry import STAGES
from compress.utils.progress import SilentProgress


def run(order: dict[str, Any]) -> None:
    """Quantize as a recipe would, but for the checks of a pipeline."""
    quiet_libraries()
    output = Path(order["output"])
    output.mkdir(exist_ok=True)
    numbers = {name: order[name] for name in ("threads", "bits", "group_size", "samples", "length")}
    setting = LanguageSetting(order["model"], order["data"], output.parent, **numbers, progress=SilentProgress())
    model: Any = Checkpoint(Path(order["model"]))
    for index, fields in enumerate(order["stages"]):
        scratch = output.parent / f"{output.name}-scratch-{index}"
        scratch.mkdir(exist_ok=True)
        model = STAGES[fields["kind"]].model_validate(fields).run(model, setting.context(scratch))
    model.save(output)


if __name__ == "__main__":
    answer(
        run,
        ("compress", "transformers", "torch"),
        ("torch", "transformers.modeling_utils", "compress.stages.gptq.quantizer"),
    )
