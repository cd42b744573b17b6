"""The stage `gptq` of this project, quick and alone, measured as the peers are.

    PY peers/compress_gptq.py ORDER.json ANSWER.json

ORDER has `model`, `data`, `samples`, `length`, `output`, `bits`, `group_size`, `threads`. Only linear layers are
quantized, and all tokens count alike. In ANSWER are `seconds` from before the weights are read until the checkpoint is
written, the text's reading and tokenizing included, which the peers are spared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from language_setting import LanguageSetting
from quantizing import answer

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.silence import quiet_libraries
from compress.progress import SilentProgress
from compress.stages.gptq import Gptq


def run(order: dict[str, Any]) -> None:
    """Quantize as a recipe would, but for the checks of a pipeline."""
    quiet_libraries()
    output = Path(order["output"])
    output.mkdir(exist_ok=True)
    numbers = {name: order[name] for name in ("threads", "bits", "group_size", "samples", "length")}
    setting = LanguageSetting(order["model"], order["data"], output.parent, **numbers, progress=SilentProgress())
    stage = Gptq(
        bits=setting.bits,
        group_size=setting.group_size,
        samples=setting.samples,
        sequence_length=setting.length,
        guided=False,
    )
    context = setting.context(output.parent / f"{output.name}-scratch")
    stage.run(Checkpoint(Path(order["model"])), context).save(output)


if __name__ == "__main__":
    answer(
        run,
        ("compress", "transformers", "torch"),
        ("torch", "transformers.modeling_utils", "compress.quantization.run"),
    )
