"""Stages of this project, measured in the same way as other tools.

    PY peers/compress_stages.py ORDER.json ANSWER.json

ORDER has `model`, `data`, `samples`, `length`, `output`, `bits`, `group_size`, `threads`, and `stages`: the fields of
each stage with its `kind`, as in a recipe. In ANSWER, `seconds` includes reading the weights, writing the last
checkpoint, and reading and tokenizing the text, which is not included for other tools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from language_setting import LanguageSetting
from quantizing import run_order

from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint
from compress.stages.registry import STAGES
from compress.utils.progress import SilentProgress


def run(order: dict[str, Any]) -> None:
    """Run the stages without the pipeline's checks."""
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
    run_order(
        run,
        ("compress", "transformers", "torch"),
        ("torch", "transformers.modeling_utils", "compress.stages.gptq.quantizer"),
    )
